"""lm-eval's local-completions measures this server as its hf model measures the same checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.embedded_harness import engine_config
from tests.support.http_server import served
from tests.support.tiny_policy import make_tiny_policy

pytest.importorskip("lm_eval", reason="needs the package lm_eval, which the extra dev has")

ROWS = [
    {"question": "the cat sat on the", "choices": [" mat", " dog and the cat", "!"], "answer": 0},
    {"question": "2 + 3 = 5, 3 + 4 =", "choices": [" 7", " eight", " 5 or so"], "answer": 0},
    {"question": "Zürich und Basel sind Städte", "choices": [" in der Schweiz", " 日本"], "answer": 0},
    {"question": "abcabcabc", "choices": ["abc", "cba", "xyz", "a"], "answer": 0},
]
CHOICE = """
task: toy_choice
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""
GENERATE = """
task: toy_generate
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two tasks over one local file."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("ROWS", json.dumps(str(rows))))
    return tmp_path


def measured(tasks: Path, kind: str, /, **arguments: Any) -> dict[str, list[Any]]:
    """Each task's responses of the model, a document's in a list."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = simple_evaluate(
        kind, arguments, ["toy_choice", "toy_generate"], task_manager=manager, batch_size=3, bootstrap_iters=0
    )
    samples = results["samples"]
    ordered = {name: sorted(each, key=lambda sample: sample["doc_id"]) for name, each in samples.items()}
    return {name: [sample["resps"] for sample in each] for name, each in ordered.items()}


@pytest.mark.parametrize(
    "checkpoint", ["tiny", pytest.param("models/SmolLM2-135M-Instruct", marks=pytest.mark.real_model)]
)
def test_lm_eval_measures_the_server_as_it_measures_transformers(checkpoint: str, tasks: Path) -> None:
    folder = Path(checkpoint)
    if checkpoint == "tiny":
        folder = make_tiny_policy(tasks / "policy", max_position_embeddings=500)
    expected = measured(tasks, "hf", pretrained=str(folder), dtype="float32", device="cpu", max_length=500)
    with served(engine_config(folder, "LOOKUP")) as server:
        url = f"{server.url}/v1/completions"
        ours = measured(tasks, "local-completions", model="m", base_url=url, tokenizer=str(folder), max_length=500)
    assert ours["toy_generate"] == expected["toy_generate"]
    for of_ours, of_theirs in zip(ours["toy_choice"], expected["toy_choice"], strict=True):
        for [(logprob, is_greedy)], [(reference, is_greedy_reference)] in zip(of_ours, of_theirs, strict=True):
            assert logprob == pytest.approx(reference, abs=1e-3)
            assert is_greedy == is_greedy_reference
