"""``slime-spec doctor --slime SCRIPT`` judges slime's own launch by what slime and its servers do."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from slime_spec.launch.cli import main
from slime_spec.launch.slime.doctor import OF_THIS_PROJECT, SlimeLaunch, slimes_own
from slime_spec.preflight.checks import TRAPS
from tests.support.doctor_facts import CHAIN, EAGLE3_HEAD, SERVERS, make_facts, python_with
from tests.support.tiny_policy import make_tiny_policy

Capture = pytest.CaptureFixture[str]
HEAD = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": 200}
SCRIPT = """
ARGS=(
   --hf-checkpoint {target} --prompt-data {data} --input-key text --label-key label --rm-type random
   --rollout-batch-size 2 --n-samples-per-prompt 2 --rollout-max-response-len 64 --global-batch-size 4
   --actor-num-nodes 1 --actor-num-gpus-per-node 1 --num-rollout 3
   --sglang-speculative-algorithm EAGLE3 --sglang-speculative-draft-model-path {draft}
   --sglang-speculative-num-steps 3 --sglang-speculative-eagle-topk 1 --sglang-speculative-num-draft-tokens 4
   --sglang-attention-backend fa3 --sglang-mem-fraction-static 0.8 {extra}
)
python3 train.py --colocate ${{ARGS[@]}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    like_llama = {"torch_dtype": "bfloat16", "max_position_embeddings": 8192, "num_hidden_layers": 8}
    config = make_tiny_policy(tmp_path / "target", **like_llama) / "config.json"
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text(json.dumps({**json.loads(config.read_text()), **HEAD}))
    (tmp_path / "data.jsonl").write_text('{"text": "one two", "label": "2"}\n' * 4)
    return tmp_path


def doctor(folder: Path, capsys: Capture, sglang: str, extra: str = "") -> dict[str, dict[str, Any]]:
    """The findings by their ids."""
    script = folder / "run.sh"
    paths = {"target": folder / "target", "draft": folder / "draft", "data": folder / "data.jsonl"}
    script.write_text(SCRIPT.format(**paths, extra=extra))
    python = python_with(Path(mkdtemp(dir=folder)), sglang=sglang)
    main(["doctor", "--slime", str(script), "--json", "--sglang-python", str(python), "--ray-address", "auto"])
    return {each["id"]: each for each in json.loads(capsys.readouterr().out)["findings"]}


def test_slimes_updates_and_metadata_are_judged_by_the_servers_release(folder: Path, capsys: Capture) -> None:
    newer = doctor(folder, capsys, "0.5.21")
    assert "SGLang 0.5.21 refuses slime's updates" in newer["slime-draft-sync"]["read"]
    assert newer["slime-metadata"]["fix"] == [
        "--custom-generate-function-path",
        "slime_spec.integrations.slime.generate",
    ]
    assert "slime-acceptance" in newer
    assert not OF_THIS_PROJECT & newer.keys()


@pytest.mark.parametrize(
    ("release", "transport", "told"),
    [
        ("0.5.9", ("--colocate",), "loads the target's tensors of slime's updates into the draft"),
        ("0.5.9", (), None),
        ("0.5.20", ("--colocate",), "loads the target's tensors"),
        ("0.5.23", (), "refuses slime's updates"),
    ],
)
def test_what_an_update_does_to_a_draft_depends_on_the_release(
    release: str, transport: tuple[str, ...], told: str | None, tmp_path: Path
) -> None:
    eagle3 = (*SERVERS, "--speculative-algorithm", "EAGLE3", *CHAIN)
    facts = make_facts(tmp_path, eagle3, draft=EAGLE3_HEAD, version=release)
    launch = SlimeLaunch((), dict.fromkeys(transport, ()), ())
    found = {each.id: each.read for each in slimes_own(launch, facts)}
    assert (told is None and "slime-draft-sync" not in found) or str(told) in found["slime-draft-sync"]
    assert ("slime-metadata" in found) is (release != "0.5.9")


def test_a_launch_with_the_hooks_has_nothing_more_to_add(folder: Path, capsys: Capture) -> None:
    hooks = (
        "--custom-generate-function-path slime_spec.integrations.slime.generate "
        "--custom-rollout-log-function-path slime_spec.integrations.slime.log_rollout"
    )
    found = doctor(folder, capsys, "0.5.21", hooks)
    assert not {"slime-metadata", "slime-acceptance", "configuration"} & found.keys()
    assert "slime-draft-sync" in found


def test_the_plug_ins_block_in_slimes_file_is_checked(folder: Path, capsys: Capture) -> None:
    (folder / "own.yaml").write_text("slime_spec:\n  canary_prompt: 3\nmy_flag: 1\n")
    found = doctor(folder, capsys, "0.5.21", f"--custom-config-path {folder / 'own.yaml'}")
    assert "slime_spec.canary_prompt = 3" in found["configuration"]["read"]
    assert "Did you mean slime_spec.canary_prompts?" in found["configuration"]["remedy"]


def test_hooks_in_slimes_file_are_hooks(folder: Path, capsys: Capture) -> None:
    hooks = "slime_spec.integrations.slime"
    named = {"custom_generate_function_path": f"{hooks}.generate"}
    named["custom_rollout_log_function_path"] = f"{hooks}.log_rollout"
    (folder / "own.yaml").write_text(json.dumps({**named, "slime_spec": {"canary_prompts": 4}}))
    found = doctor(folder, capsys, "0.5.21", f"--custom-config-path {folder / 'own.yaml'}")
    assert not {"slime-metadata", "slime-acceptance", "configuration"} & found.keys()
    (folder / "own.yaml").write_text("custom_generate_function_path: null\n")  # slime's file wins over its flags
    flag = f"--custom-generate-function-path {hooks}.generate --custom-config-path {folder / 'own.yaml'}"
    assert "slime-metadata" in doctor(folder, capsys, "0.5.21", flag)


def test_another_function_does_not_read_the_servers_counters(folder: Path, capsys: Capture) -> None:
    found = doctor(folder, capsys, "0.5.21", "--custom-generate-function-path my.agent")["slime-metadata"]
    assert "name my.agent as `generate` in its block slime_spec" in found["remedy"]
    assert found["fix"] == []
    embedded = "--custom-generate-function-path slime_spec.integrations.slime.generate_embedded"
    assert "slime-metadata" not in doctor(folder, capsys, "0.5.21", embedded)


def test_the_file_that_the_plug_in_reads_itself_is_checked_where_slimes_has_no_block(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "plugin.yaml").write_text("slime_spec:\n  canary_prompt: 3\n")
    monkeypatch.setenv("SLIME_SPEC_PLUGIN", str(folder / "plugin.yaml"))
    assert "slime_spec.canary_prompt = 3" in doctor(folder, capsys, "0.5.21")["configuration"]["read"]
    (folder / "own.yaml").write_text("my_flag: 1\n")
    with_slimes = f"--custom-config-path {folder / 'own.yaml'}"
    assert "configuration" in doctor(folder, capsys, "0.5.21", with_slimes)
    (folder / "own.yaml").write_text("slime_spec: {}\n")
    assert "configuration" not in doctor(folder, capsys, "0.5.21", with_slimes)
    monkeypatch.setenv("SLIME_SPEC_PLUGIN", str(folder / "nothing.yaml"))
    assert "nothing.yaml" in json.dumps(doctor(folder, capsys, "0.5.21")["configuration"])


def test_what_this_project_does_not_know_is_told_and_no_mistake(folder: Path, capsys: Capture) -> None:
    hook = "--custom-megatron-init-path my.init"
    found = doctor(folder, capsys, "0.5.21", hook)
    assert hook in found["slime-flags"]["read"]
    assert "configuration" not in found
    (folder / "target" / "config.json").unlink()
    assert doctor(folder, capsys, "0.5.21")["not-judged"]["severity"] == "warning"


def test_a_script_that_launches_nothing_of_slimes_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "other.sh").write_text("echo no launch\n")
    assert main(["doctor", "--slime", str(tmp_path / "other.sh"), "--json"]) == 2
    assert "must call slime's train.py" in capsys.readouterr().out
    assert main(["doctor", "--slime"]) == 2
    assert "needs a launch script" in capsys.readouterr().err


def test_the_checks_that_are_left_out_are_checks_of_the_doctor() -> None:
    assert {each.id for each in TRAPS} >= OF_THIS_PROJECT
