"""How the tests themselves are run: which share a process, and which proofs run again."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import shared_by
from tests.support.proofs import ROOT, Recorder, digest_of, key_of, recorded


def test_a_file_shares_a_process_and_so_do_the_tests_of_one_real_server_in_several_files() -> None:
    assert shared_by("tests/ray/test_pool.py::test_a[EAGLE3]") == "tests/ray/test_pool.py"
    assert shared_by("tests/sglang/test_real_sglang.py::test_a[EAGLE3]") == "EAGLE3"
    assert shared_by("tests/sglang/test_real_sglang_pushes.py::test_b[EAGLE3-tensor]") == "EAGLE3"
    assert shared_by("tests/sglang/test_real_sglang.py::test_c") == "tests/sglang/test_real_sglang.py"


def test_a_proof_depends_on_every_source_it_names_and_on_its_own_file(tmp_path: Path) -> None:
    for name in ("a/one.py", "a/deep/two.c", "proof.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    (tmp_path / "a" / "notes.md").write_text("no source")
    digests = [digest_of("a proof.py", tmp_path)]
    (tmp_path / "a" / "notes.md").write_text("changed")
    (tmp_path / "a" / "one.py").write_text('"""Says what it is."""\n\nx = 1  # one\n')
    assert digest_of("a proof.py", tmp_path) == digests[0]
    for change in (
        lambda: (tmp_path / "a" / "deep" / "two.c").write_text("changed"),
        lambda: (tmp_path / "proof.py").write_text("x = 2"),
        lambda: (tmp_path / "a" / "one.py").rename(tmp_path / "a" / "renamed.py"),
        lambda: (tmp_path / "a" / "three.py").write_text("y = 1"),
    ):
        change()
        digests.append(digest_of("a proof.py", tmp_path))
    assert len(set(digests)) == len(digests)
    with pytest.raises(FileNotFoundError):
        digest_of("b", tmp_path)
    assert key_of(["rollout/embedded"], ROOT / "tests" / "x.py") == "rollout/embedded tests/x.py"


def report(key: str, passed: bool, when: str = "call") -> Any:
    return SimpleNamespace(user_properties=[("proves", key)], when=when, passed=passed)


def test_only_what_passed_whole_is_recorded_and_what_did_not_run_is_kept(tmp_path: Path) -> None:
    record = tmp_path / "proven.json"
    record.write_text(json.dumps({"setup.py": "kept", "pyproject.toml": "old", "README.md": "stale", "LICENSE": "old"}))
    recorder = Recorder(record)
    recorder.pytest_runtest_logreport(report("pyproject.toml", True))
    recorder.pytest_runtest_logreport(report("README.md", True))
    recorder.pytest_runtest_logreport(report("README.md", False))
    recorder.pytest_runtest_logreport(report("LICENSE", True))
    recorder.pytest_runtest_logreport(report("LICENSE", False, when="setup"))
    recorder.pytest_sessionfinish()
    assert recorded(record) == {"setup.py": "kept", "pyproject.toml": digest_of("pyproject.toml")}


def test_every_proof_names_sources_that_exist_and_the_record_names_only_proofs() -> None:
    """A key of the record that no proof has would stand there for ever and prove nothing."""
    files = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if "proves(" in file.read_text()]
    modules = [import_module(".".join(file.relative_to(ROOT).with_suffix("").parts)) for file in files]
    keys = {key_of(module.PROVES.args, Path(module.__file__)) for module in modules if hasattr(module, "PROVES")}
    assert len(keys) == 2
    assert all(len(digest_of(key)) == 32 for key in keys)
    assert set(recorded()) <= keys
