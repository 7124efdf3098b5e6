"""Every mistake ends within seconds, in one message with setting, rule, value and remedy."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime_spec.launch.cli import main


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


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a command that must be refused; a traceback would be an exception here."""
    assert main(["train", "--config", "tiny", *argv]) == 2
    message = capsys.readouterr().err
    assert all(f"  {fact}:" in message for fact in ("rule", "value", "remedy")), message
    assert "Traceback" not in message
    return message


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
        (("--speculative-algorithm", "DFLASH"), "available: NONE, LOOKUP"),
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
        (("--ray-address", "127.0.0.1:1"), "ray_address"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(argv, expected, policy, tmp_path, capsys):
    arguments = ("--hf-checkpoint", str(policy), "--output-dir", str(tmp_path / "run"), *argv)
    assert expected in refused(capsys, *arguments)


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
