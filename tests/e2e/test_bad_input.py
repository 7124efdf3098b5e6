"""Every mistake ends within seconds, in one message with setting, rule, value and remedy."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime_spec.launch.cli import main
from slime_spec.launch.flags import REFUSED
from slime_spec.rl.rollout_data import save_rollout
from slime_spec.sglang.flags import sglang_version
from tests.support.doctor_cases import CASES
from tests.support.doctor_facts import TARGET, Case, python_with
from tests.support.refused_launches import BROKEN_FILES, CONTRADICTIONS, SPECULATIVE_CONTRADICTIONS


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """These commands run in this process: what they set for Ray must not reach the tests after them."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")


@pytest.fixture
def copy(policy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(policy, tmp_path / "copy"))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop_a_tensor(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def misshape_a_tensor(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))


def poison_a_tensor(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))


def shrink_the_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = 100
    (folder / "config.json").write_text(json.dumps(config))


def change_the_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["MambaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))


def lose_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def refused_by_the_launch(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a command that must be refused; a traceback would be an exception here."""
    assert main(["train", *argv]) == 2
    message = capsys.readouterr().err
    assert all(f"  {fact}:" in message for fact in ("rule", "value", "remedy")), message
    assert "Traceback" not in message
    return message


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a small run that must be refused, by each of the three commands."""
    return refused_by_all_three(capsys, "--config", "tiny", *argv)


def refused_by_all_three(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of the launch, every rule of which the dry run and the doctor say as well: case reports/03."""
    message = refused_by_the_launch(capsys, *argv)
    told = message.partition("  rule:")[2].partition("\n  value:")[0]
    rules = [line.strip().partition(": ")[2] for line in told.splitlines() if line] if told[0] == "\n" else [told]
    assert main(["train", *argv, "--dry-run"]) == 2
    dry_run = "".join(capsys.readouterr())
    assert main(["doctor", "--json", *argv]) == 2
    findings = json.loads(capsys.readouterr().out)["findings"]
    doctor = "\n".join(each["read"] for each in findings if each["severity"] == "error")
    assert rules
    for rule in rules:
        assert as_one_line(rule) in as_one_line(dry_run)
        assert as_one_line(rule) in as_one_line(doctor)
    return message


def as_one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, "must be a whole safetensors file"),
        (drop_a_tensor, "model.layers.1.mlp.up_proj.weight"),
        (misshape_a_tensor, "model.norm.weight"),
        (poison_a_tensor, "must be finite"),
        (shrink_the_vocabulary, "vocab"),
        (change_the_family, "MambaForCausalLM"),
        (lose_the_tokenizer, "tokenizer"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_before_ray_starts(damage, expected, copy, tmp_path, capsys):
    damage(copy)
    message = refused(capsys, "--hf-checkpoint", str(copy), "--output-dir", str(tmp_path / "run"))
    assert expected in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--hf-checkpoint", "/nowhere"), "config.json"),
        (("--num-rolout", "3"), "--num-rollout"),
        (("trainer.lrr=1e-6",), "trainer.lr"),
        (("--lr", "fast"), "trainer.lr"),
        (("--n-samples-per-prompt", "0"), "at least 1"),
        (("--debug-rollout-only", "--debug-train-only"), "debug-train-only"),
        (("--debug-train-only",), "load-debug-rollout-data"),
        (("--rollout-max-prompt-len", "600"), "context"),
        (("--sglang-context-length", "100000"), "max_position_embeddings"),
        (("--speculative-algorithm", "EAGLE3"), "--speculative-draft-model-path"),
        (("--speculative-algorithm", "DSPARK"), "must name the draft's folder"),
        (("--speculative-algorithm", "LOOKUP", "--speculative-accept-threshold-acc", "0.9"), "lossy"),
        (("--speculative-algorithm", "EGALE"), "EAGLE"),
        (("--tensor-model-parallel-size", "4", "--actor-world-size", "4"), "tensor"),
        (("engine.kv_cache_gb=0.0001",), "engine.kv_cache_gb"),
        (("--load", "/nowhere"), "must be a checkpoint"),
        (("--load", "/nowhere", "--save", "/nowhere/else"), "must be a checkpoint"),
        (("--debug-train-only", "--load-debug-rollout-data", "/nowhere/{rollout_id}.pt"), "a file of each step"),
        (("--save-interval", "3", "--update-weights-interval", "2"), "multiple of push.interval"),
        (("--task", "adding"), "add10"),
        (("--prompt-data", "/nowhere.jsonl"), "/nowhere.jsonl"),
        (("--task", "tests.support.rewards:nothing"), "tests.support.rewards"),
        (("--load", "/nowhere"), "/nowhere"),
        (("run.seed=" + "9" * 30,), "2147483647"),
        (("trainer.adam_beta1=1.0",), "below 1"),
        (("--rollout-stop=",), "empty"),
        (("--rollout-stop-token-ids=-3",), "at least 0"),
        (("engine.kv_cache_gb=1e300",), "at most 1e+06"),
        (("--rollout-temperature", "1e39"), "at most"),
        (("--rollout-top-k", "0"), "keeps no token"),
        (("--global-batch-size", "3"), "divide"),
        (("--sglang-context-length", "64"), "must hold max_prompt_len"),
        (
            (
                "--speculative-algorithm",
                "NGRAM",
                "speculative.ngram_external_corpus_path=/nowhere",
                "speculative.ngram_external_sam_budget=2",
            ),
            "/nowhere",
        ),
        (("--skip-check", "nothing"), "must name checks"),
        (("--config", "/nowhere.yaml"), "/nowhere.yaml"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(argv, expected, policy, tmp_path, capsys):
    arguments = ("--hf-checkpoint", str(policy), "--output-dir", str(tmp_path / "run"), *argv)
    assert expected in refused(capsys, *arguments)


def test_what_is_refused_of_a_command_line_is_refused_alike_by_launch_dry_run_and_doctor(capsys):
    """Case reports/03, audit/60."""
    contradictions = [argv for argv, *_ in (*CONTRADICTIONS, *SPECULATIVE_CONTRADICTIONS)]
    for words in (*map(str.split, contradictions), *([flag, "1"] for flag in REFUSED)):
        refused_by_all_three(capsys, *words)


def test_a_configuration_file_that_is_refused_is_refused_alike_by_launch_dry_run_and_doctor(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    for text, _ in BROKEN_FILES:
        path.write_text(text)
        refused_by_all_three(capsys, "--config", str(path))


# A case of each trap that stops a launch for its words and for what the config.json files say.
STOPPING = {each.trap: each for each in CASES if each.sees == "error" and each.facts.keys() <= {"target", "draft"}}


@pytest.mark.parametrize("each", STOPPING.values(), ids=STOPPING)
def test_a_trap_that_stops_a_launch_stops_dry_run_and_doctor(each: Case, tmp_path, capsys):
    python = python_with(tmp_path, sglang=sglang_version())
    words = [*each.argv, "--output-dir", str(tmp_path / "run"), "--sglang-python", str(python)]
    folders = (
        ("--hf-checkpoint", each.facts.get("target", TARGET)),
        ("--speculative-draft-model-path", each.facts.get("draft")),
    )
    for flag, keys in folders:
        if keys is not None:
            (tmp_path / flag).mkdir()
            (tmp_path / flag / "config.json").write_text(json.dumps(keys))
            words += [flag, str(tmp_path / flag)]
    assert f"{each.trap}: " in refused_by_all_three(capsys, *words)


def test_a_server_flag_that_is_unknown_hides_nothing_else_where_no_sglang_is_installed(policy, tmp_path, capsys):
    engine = ("--rollout-engine", "sglang", "--sglang-python", "/nowhere/python", "--debug-rollout-only")
    paths = ("--hf-checkpoint", str(policy), "--output-dir", str(tmp_path / "run"))
    assert "sglang-version" in refused(capsys, *paths, *engine, "--sglang-extra-args=--enable-warp-drive")


def test_what_only_the_start_can_know_is_refused_by_the_start(policy, capsys, tmp_path):
    arguments = ("--hf-checkpoint", str(policy), "--output-dir", str(tmp_path / "run"), "--ray-address", "127.0.0.1:1")
    assert "ray_address" in refused_by_the_launch(capsys, "--config", "tiny", *arguments)
    assert main(["train", "--config", "tiny", *arguments, "--dry-run"]) == 0
    assert "only the start knows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--rm-type", "maths"), "task.reward"),
        (("--rm-type", "no.such.module:reward"), "no.such.module"),
        (("--input-key", "question"), "question"),
        (("--label-key", "answer"), "answer"),
        (("--rollout-max-prompt-len", "1"), "must let a prompt of"),
    ],
)
def test_data_that_a_run_cannot_use_is_refused(argv, expected, policy, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "What is 2 + 3?", "label": "5"}\n')
    paths = ("--hf-checkpoint", str(policy), "--prompt-data", str(data), "--output-dir", str(tmp_path / "run"))
    assert expected in refused(capsys, *paths, *argv)


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("tokenizer_config.json", {"chat_template": None}, "chat_template"),
        ("config.json", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope"),
        ("config.json", {"hidden_act": "gelu"}, "hidden_act"),
        ("config.json", {"num_hidden_layers": 4}, "model.layers.3"),
    ],
)
def test_a_checkpoint_that_the_run_cannot_compute_is_refused(file, change, expected, copy, tmp_path, capsys):
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert expected in refused(capsys, "--hf-checkpoint", str(copy), "--output-dir", str(tmp_path / "run"))


def test_saved_rollouts_of_which_a_later_one_is_missing_are_refused(policy, tmp_path, capsys):
    """Case reports/13."""
    save_rollout(str(tmp_path / "{rollout_id}.pt"), 0, [])
    saved = ("--debug-train-only", "--load-debug-rollout-data", str(tmp_path / "{rollout_id}.pt"), "--num-rollout", "3")
    message = refused(capsys, "--hf-checkpoint", str(policy), "--output-dir", str(tmp_path / "run"), *saved)
    assert "1.pt" in message


def test_all_that_stands_in_the_way_is_reported_at_once(copy, tmp_path, capsys):
    lose_the_tokenizer(copy)
    drop_a_tensor(copy)
    (tmp_path / "data.jsonl").write_text("{\n")
    paths = ("--hf-checkpoint", str(copy), "--output-dir", str(tmp_path / "run"))
    wrong = ("--prompt-data", str(tmp_path / "data.jsonl"), "--load", "/nowhere", "--rollout-max-prompt-len", "600")
    message = refused(capsys, *paths, *wrong)
    for expected in ("tokenizer.json", "up_proj", "data.jsonl:1", "/nowhere", "context of"):
        assert expected in message


def test_a_broken_line_of_data_is_named_by_its_number(policy, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "label": "1"}\n{"prompt": "b", "label": \n')
    message = refused(
        capsys, "--hf-checkpoint", str(policy), "--prompt-data", str(data), "--output-dir", str(tmp_path / "run")
    )
    assert f"{data}:2" in message


def test_a_prompt_longer_than_allowed_is_named_by_its_line(policy, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "label": "1"}\n' + json.dumps({"prompt": "long " * 60, "label": "2"}) + "\n")
    strict = ("--prompt-data", str(data), "--refuse-overlong-prompts")
    message = refused(capsys, "--hf-checkpoint", str(policy), *strict, "--output-dir", str(tmp_path / "run"))
    assert f"{data}:2" in message
