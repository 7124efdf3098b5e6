"""JSON of files is parsed in one guarded module: a damaged file must be one error, whatever reads it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.architecture.test_imports import MODULES

READER = "slime_spec.files"
# Module -> why it parses JSON itself.
EXCEPTIONS = {
    "rollout.sglang_engine.client": "a server's answers",
    "slime_spec.sglang.server_info": "a server's answers",
    "slime_spec.bench.peers.process": "the output of a process of ours",
    "slime_spec.bench.peers.worker": "the input of a process of ours",
    "slime_spec.bench.cost": "the output of a process of ours",
    "slime_spec.bench.rows": "the report that the same command has just made",
    "slime_spec.bench.robustness.fuzzer": "answers, which must be JSON without NaN",
    "slime_spec.bench.robustness.damage": "texts of its own, to damage them",
    "slime_spec.sglang.flags": "a table that ships with the package",
    "rollout.sglang_engine.recordings": "a table that ships with the package",
    "slime_spec.launch.draft.started": "tuples to lists and back, beside the file",
    "slime_spec.bench.learning": "a file that the same command wrote",
    "slime_spec.bench.peers.catalogue": "a file that the same command wrote",
}


def parses_json(source: str) -> bool:
    """Whether a source calls ``json.loads`` or ``json.load``, or hands one of them on."""
    tree = ast.parse(source)
    return any(
        isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.loads", "json.load") for node in ast.walk(tree)
    )


def test_one_module_parses_files_and_the_exceptions_are_known() -> None:
    parsing = {module for module, path in MODULES.items() if parses_json(Path(path).read_text())}
    assert READER in parsing
    assert parsing - {READER} == EXCEPTIONS.keys()


def test_no_module_of_the_checkpoints_parses_json_itself() -> None:
    assert not [module for module in EXCEPTIONS if module.startswith("slime_spec.checkpoints")]


@pytest.mark.parametrize(
    ("source", "is_parser"),
    [
        ('import json\nconfig = json.loads((folder / "config.json").read_text())', True),
        ("import json\nwith path.open() as file:\n    row = json.load(file)", True),
        ("import json\nrows = asyncio.to_thread(json.loads, body)", True),
        ('import json\n(folder / "config.json").write_text(json.dumps(config))', False),
        ("from slime_spec.files import read_json\nconfig = read_json(path)", False),
    ],
)
def test_a_second_reader_would_be_seen(source: str, is_parser: bool) -> None:
    assert parses_json(source) == is_parser
