"""The draft that ships with the package: small, whole, and what its provenance says it is."""

import json
from pathlib import Path

import pytest
import torch

import slime_spec.checkpoints
from slime_spec.checkpoints.draft_choice import choose_draft
from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import load_draft
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import load_tensors
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config, ModelConfig, SpeculativeConfig
from slime_spec.launch.draft.provenance import file_sha256, tensors_checksum
from slime_spec.tasks.builtin import SUITES, TASKS
from slime_spec.types import GroupRequest
from tests.support.embedded_harness import greedy, make_core, run

NAME = "smollm2-135m-eagle3"
FOLDER = Path(slime_spec.checkpoints.__file__).parent / "builtin" / NAME
MEGABYTE = 1_000_000
# What SmolLM2-135M's config.json says, as far as a draft's checks ask.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
MODEL = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"


def test_the_draft_is_small_and_loads_under_every_check() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 20 * MEGABYTE
    draft = load_draft(FOLDER, DraftSpec.from_folder(FOLDER, ModelSpec.from_dict(SMOLLM2)))
    assert draft.spec.capture_layers == (1, 14, 26)
    assert draft.spec.block.max_position_embeddings == 8192
    assert draft.hot_token_ids is not None
    assert 2 in draft.hot_token_ids.tolist()  # <|im_end|>, which ends every reply
    assert {tensor.dtype for tensor in draft.tensors.values()} == {torch.bfloat16}


def test_its_provenance_is_that_of_the_file() -> None:
    record = json.loads((FOLDER / "provenance.json").read_text())
    weights = FOLDER / "model.safetensors"
    assert record["sha256"]["model.safetensors"] == file_sha256(weights)
    assert record["bytes"] == weights.stat().st_size
    assert record["target"]["name"] == "SmolLM2-135M-Instruct"
    assert record["training"]["updates"] == record["training"]["updates_planned"]
    assert record["held_out"]["task greedy"]["tokens_per_verify"] >= 3.0


@pytest.mark.real_model
def test_it_drafts_for_the_model_it_was_trained_on() -> None:
    """Problems of its task: greedy replies unchanged, at least 2.8 tokens a round with chains of three."""
    record = json.loads((FOLDER / "provenance.json").read_text())
    assert tensors_checksum(load_tensors(MODEL, ModelSpec.from_folder(MODEL))) == record["target"]["checksum"]
    settings = {"draft_model_path": f"builtin:{NAME}", "num_steps": 3, "eagle_topk": 1, "num_draft_tokens": 4}
    model = ModelConfig(hf_checkpoint=str(MODEL))
    config = Config(model=model, speculative=SpeculativeConfig(algorithm="EAGLE3", **settings))
    chosen = choose_draft(config, ModelSpec.from_folder(MODEL))
    assert chosen is not None
    assert chosen.folder == FOLDER
    tokenizer = Tokenizer.load(MODEL)
    tasks = [TASKS[name] for name in SUITES["arithmetic_sentences"]]
    prompts = [tokenizer.chat(tasks[i % 2].problem(10_000 + i, seed=7).text) for i in range(8)]
    requests = [GroupRequest(str(i), prompt, (0,), greedy(64)) for i, prompt in enumerate(prompts)]
    plain, drafted = run(make_core(Config(model=model)), requests), run(make_core(config), requests)
    assert {key: each.token_ids for key, each in drafted.items()} == {
        key: each.token_ids for key, each in plain.items()
    }
    rounds = sum(each.spec.num_rounds for each in drafted.values())
    assert sum(len(each.token_ids) - 1 for each in drafted.values()) / rounds >= 2.8


def test_the_measurements_say_what_its_provenance_recorded() -> None:
    record = json.loads((FOLDER / "provenance.json").read_text())
    page = (Path(__file__).parents[2] / "docs" / "measurements.md").read_text(encoding="utf-8")
    assert f"- command: `{record['command']}`\n- date: {record['date']}" in page
    for kind, found in record["held_out"].items():
        by_position = [
            " / ".join(f"{share:.3f}" for share in found[name]) for name in ("conditional", "acceptance_rate")
        ]
        row = [kind, str(found["sequences"]), f"{found['tokens_per_verify']:.2f}", *by_position]
        assert f"| {' | '.join(row)} |\n" in page
