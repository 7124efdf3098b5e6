"""A checkpoint folder has one reader: no other module parses JSON in the same file that names config.json."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.architecture.test_imports import MODULES
from tests.architecture.test_one_family_one_file import strings_of_code

READER = "slime_spec.checkpoints.folder"


def parses_json(source: str) -> bool:
    """Whether a source calls ``json.loads`` or ``json.load``."""
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = {ast.unparse(call) for call in calls if isinstance(call, ast.Attribute)}
    return not names.isdisjoint({"json.loads", "json.load"})


def reads_checkpoints(module: str, source: str) -> bool:
    """Whether a source parses JSON, and is of the checkpoints' package or names a file of a checkpoint folder."""
    names_files = any("config.json" in text or ".safetensors" in text for text in strings_of_code(source))
    return parses_json(source) and (names_files or module.startswith("slime_spec.checkpoints."))


def test_one_module_parses_what_a_checkpoint_folder_says() -> None:
    readers = {module for module, path in MODULES.items() if reads_checkpoints(module, Path(path).read_text())}
    assert readers == {READER}


@pytest.mark.parametrize(
    ("source", "is_reader"),
    [
        ('import json\nconfig = json.loads((folder / "config.json").read_text())', True),
        ('import json\nindex = json.loads((folder / "model.safetensors.index.json").read_text())', True),
        ("import json\nrow = json.loads(line)", False),
        ('import json\n(folder / "config.json").write_text(json.dumps(config))', False),
    ],
)
def test_a_second_reader_would_be_seen(source: str, is_reader: bool) -> None:
    assert reads_checkpoints("slime_spec.rl.loop", source) == is_reader
