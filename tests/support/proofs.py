"""Proofs of minutes that run when what they prove has changed: a record of what was last proven, and its comparison.

    @pytest.mark.proves("rollout.embedded.drafters")
    def test_...(): ...

``tests/proven.json`` holds, for each file with such tests, a digest of all that the file imports of this repository,
as it was when its proofs last passed. The marker names what is used and imported nowhere: what a table of settings
names in a string, what another process runs (a module, a folder, or one file by its path). A proof whose digest is
the recorded one is skipped; ``--all`` runs every proof, ``--record-proofs`` as well, and writes what has passed. A
record that is out of date costs time, and never a proof.
What says the same of fewer samples (``proven_by_more``) is skipped with its file's proofs.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from tests.support.imports import imported

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "proven.json"
NAMED = (".py", ".json", ".yaml", ".jsonl", ".sh")  # what counts of a folder that a proof names
PINS = "constraints.txt"  # another release of torch is another thing to prove


def sources_of(proof: str, root: Path = ROOT) -> list[str]:
    """The proof's file, all that it imports or names below ``root``, through others too, and C sources beside those.

    Raises LookupError for a name of the marker that is no module, no package and no file.
    """
    found: set[Path] = set()
    waiting = [root / proof, *_named_files(root / proof, root)]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _imported_files(file, root) if file.suffix == ".py" else []
            waiting += [each for each in file.parent.iterdir() if each.suffix in (".c", ".h")]
    return sorted(file.relative_to(root).as_posix() for file in found)


def _named_files(proof: Path, root: Path) -> list[Path]:
    """What the file's ``proves(...)`` name: modules, of a package or a folder what is in it, a file by its path."""
    calls = (node for node in ast.walk(ast.parse(proof.read_text())) if isinstance(node, ast.Call))
    marks = (call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "proves")
    files: list[Path] = []
    for name in {ast.literal_eval(word) for mark in marks for word in mark.args}:
        place = root / name.replace(".", "/")
        named = [place.with_suffix(".py"), *place.rglob("*")]
        found = [each for each in named if each.suffix in NAMED and each.is_file()]
        found += [root / name] if (root / name).is_file() else []
        if not found:
            raise LookupError(f"{proof.name} proves {name!r}, which is no module, no package and no file")
        files += found
    return files


def _imported_files(file: Path, root: Path) -> list[Path]:
    """What importing executes: each module that is named, and the packages that it is in."""
    names = _imported(file.read_text())
    packages = {".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts))}
    places = [root / name.replace(".", "/") for name in names | packages]
    files = [each for place in places for each in (place.with_suffix(".py"), place / "__init__.py")]
    return [each for each in files if each.is_file()]


def digest_of(proof: str, root: Path = ROOT) -> str:
    """A digest of every source of the proof (a path from ``root``), its name, and the pinned releases of libraries.

    Of Python only the code counts: a proof does not depend on comments, docstrings and line breaks. Raises
    FileNotFoundError where the proof's file is not there.
    """
    digest = hashlib.sha256((root / PINS).read_bytes())
    for name in sources_of(proof, root):
        file = root / name
        digest.update(name.encode() + b"\0")
        digest.update(_digest_of_code(file.read_text()) if file.suffix == ".py" else file.read_bytes())
    return digest.hexdigest()[:32]


# Proofs share most of what they import.
_imported = cache(imported)


@cache
def _digest_of_code(source: str) -> bytes:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        # A string that stands alone is a docstring, or a comment in its place.
        for name, body in ast.iter_fields(node):
            if isinstance(body, list) and any(isinstance(each, ast.stmt) for each in body):
                setattr(node, name, [each for each in body if not _is_text(each)])
    return hashlib.sha256(ast.dump(tree).encode()).digest()


def _is_text(node: ast.AST) -> bool:
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant and isinstance(node.value.value, str)


def recorded(record: Path = RECORD) -> Mapping[str, str]:
    """Digests by the proof's file; empty where nothing was recorded."""
    proven: Mapping[str, str] = json.loads(record.read_text()) if record.is_file() else {}
    return proven


class Recorder:
    """Remembers which proofs passed, here or in the workers of a run, and writes their digests at its end."""

    def __init__(self, record: Path = RECORD) -> None:
        self._record = record
        self._passed: dict[str, bool] = {}

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, proof in report.user_properties:
            if name == "proves":  # its set-up and its end count too: an error or a skip there is no proof
                self._passed[str(proof)] = self._passed.get(str(proof), True) and report.passed

    @pytest.hookimpl
    def pytest_sessionfinish(self) -> None:
        digests = {proof: digest_of(proof) for proof, passed in self._passed.items() if passed}
        kept = {proof: digest for proof, digest in recorded(self._record).items() if proof not in self._passed}
        self._record.write_text(json.dumps({**kept, **digests}, indent=2, sort_keys=True) + "\n")
