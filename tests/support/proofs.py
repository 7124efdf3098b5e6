"""Proofs of minutes that run when what they prove has changed: a record of what was last proven, and its comparison.

    @proves("rollout/embedded/verification", "rollout/embedded/uniforms.py")
    def test_...(): ...

``tests/proven.json`` holds, for each set of paths, a digest of the files as they were when their proofs last passed.
A proof whose digest is the recorded one is skipped; ``--all`` runs every proof, ``--record-proofs`` writes what has
passed. A record that is out of date therefore costs time, and never a proof.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "proven.json"
SOURCES = (".py", ".c", ".h")


def proves(*paths: str) -> pytest.MarkDecorator:
    """Mark a test as a proof of these files and folders (relative to the repository)."""
    return pytest.mark.proves(*paths)


def key_of(paths: Sequence[str], test_file: Path) -> str:
    """The record's key: the paths, and the file of the proof itself."""
    return " ".join(sorted({*paths, test_file.relative_to(ROOT).as_posix()}))


def digest_of(key: str, root: Path = ROOT) -> str:
    """A digest of every source below the key's paths, and its name; raises FileNotFoundError for a path without any.

    Of Python only the code counts: a proof does not depend on comments, docstrings and line breaks.
    """
    digest = hashlib.sha256()
    for path in key.split(" "):
        place = root / path
        files = sorted(each for each in place.rglob("*") if each.suffix in SOURCES) if place.is_dir() else [place]
        if not files:
            raise FileNotFoundError(f"{place} holds no source")
        for file in files:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + _code_of(file) + b"\0")
    return digest.hexdigest()[:32]


def _code_of(file: Path) -> bytes:
    if file.suffix != ".py":
        return file.read_bytes()
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        # A string that stands alone is a docstring, or a comment in its place.
        for name, body in ast.iter_fields(node):
            if isinstance(body, list) and any(isinstance(each, ast.stmt) for each in body):
                setattr(node, name, [each for each in body if not _is_text(each)])
    return ast.dump(tree).encode()


def _is_text(node: ast.AST) -> bool:
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant and isinstance(node.value.value, str)


def recorded(record: Path = RECORD) -> Mapping[str, str]:
    """Digests by key; empty where nothing was recorded."""
    proven: Mapping[str, str] = json.loads(record.read_text()) if record.is_file() else {}
    return proven


class Recorder:
    """Remembers which proofs passed, here or in the workers of a run, and writes their digests at its end."""

    def __init__(self, record: Path = RECORD) -> None:
        self._record = record
        self._passed: dict[str, bool] = {}

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, key in report.user_properties:
            if name == "proves":  # its set-up and its end count too: an error or a skip there is no proof
                self._passed[str(key)] = self._passed.get(str(key), True) and report.passed

    @pytest.hookimpl
    def pytest_sessionfinish(self) -> None:
        digests = {key: digest_of(key) for key, passed in self._passed.items() if passed}
        kept = {key: digest for key, digest in recorded(self._record).items() if key not in self._passed}
        self._record.write_text(json.dumps({**kept, **digests}, indent=2, sort_keys=True) + "\n")
