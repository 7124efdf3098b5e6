"""How the tests themselves are run: which share a process, and which proofs run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest
from tests.conftest import shared_by
from tests.support.proofs import ROOT, Recorder, digest_of, recorded, sources_of


def test_a_file_shares_a_process_and_so_do_the_tests_of_one_real_server_in_several_files() -> None:
    assert shared_by("tests/ray/test_pool.py::test_a[EAGLE3]") == "tests/ray/test_pool.py"
    assert shared_by("tests/sglang/test_real_sglang.py::test_a[EAGLE3]") == "EAGLE3"
    assert shared_by("tests/sglang/test_real_sglang_pushes.py::test_b[EAGLE3-tensor]") == "EAGLE3"
    assert shared_by("tests/embedded/test_speculative_sampling.py::test_d[filters-trees-20000]") == "filters"
    assert shared_by("tests/sglang/test_real_sglang.py::test_c") == "tests/sglang/test_real_sglang.py"


CRASHES = """
from tests.support.scheduling import WholeFiles

def pytest_xdist_make_scheduler(config, log):
    return WholeFiles(config, log)
"""


def test_a_process_that_dies_fails_its_test_by_name_and_every_other_test_runs(tmp_path: Path) -> None:
    """The dead process's files are whole, begun, and of one test each, which a process told of no second waits with."""
    passes, dies = "def test_{}(): pass\n", "import os\ndef test_dies(): os._exit(3)\n"
    files = {"a": passes.format(0), "b": dies, "c": passes.format(1) + dies + passes.format(2) + passes.format(3)}
    files |= {name: passes.format(4) for name in "defgh"}
    for name, text in files.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    (tmp_path / "conftest.py").write_text(CRASHES)
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadscope", "--no-loadscope-reorder", "-q"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "2 failed, 9 passed" in done.stdout
    assert "crashed while running 'test_b.py::test_dies'" in done.stdout
    assert "crashed while running 'test_c.py::test_dies'" in done.stdout


@pytest.fixture
def proof(tmp_path: Path) -> str:
    """A proof of a package with C sources, which imports one module there and another through it."""
    sources = {
        "constraints.txt": "torch==2.13.0",
        "test_proof.py": "from a.deep import one\nimport torch",
        "a/__init__.py": "",
        "a/deep/__init__.py": "",
        "a/deep/one.py": "def f():\n    from a.deep.two import x",
        "a/deep/two.py": "import a.deep.one\nx = 1",
        "a/deep/mix.h": "1",
        "a/other.py": "y = 1",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return "test_proof.py"


def test_a_proof_depends_on_all_that_its_file_imports_and_on_no_text(proof: str, tmp_path: Path) -> None:
    deep = ["a/__init__.py", "a/deep/__init__.py", "a/deep/mix.h", "a/deep/one.py", "a/deep/two.py"]
    assert sources_of(proof, tmp_path) == [*deep, "test_proof.py"]
    before = digest_of(proof, tmp_path)
    (tmp_path / "a" / "other.py").write_text("y = 2")
    (tmp_path / "a" / "deep" / "two.py").write_text('"""Says what it is."""\n\nimport a.deep.one\nx = 1  # one\n')
    assert digest_of(proof, tmp_path) == before


@pytest.mark.parametrize("name", ["constraints.txt", "test_proof.py", "a/__init__.py", "a/deep/two.py", "a/deep/mix.h"])
def test_a_proof_runs_again_after_a_change(name: str, proof: str, tmp_path: Path) -> None:
    before = digest_of(proof, tmp_path)
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\nz = 3")
    assert digest_of(proof, tmp_path) != before


@pytest.mark.parametrize(("digest", "skipped"), [("as recorded", ["proves", "proven_by_more"]), ("another", [])])
def test_where_a_proof_stands_neither_it_runs_nor_what_says_the_same_of_fewer_samples(
    digest: str, skipped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "recorded", lambda: {"test_proof.py": "as recorded"})
    monkeypatch.setattr(conftest, "digest_of", lambda proof: digest)
    found: list[str] = []

    def item(marker: str) -> Any:
        return SimpleNamespace(
            path=ROOT / "test_proof.py",
            user_properties=[],
            get_closest_marker=lambda name: marker if name == marker else None,
            add_marker=lambda _: found.append(marker),
        )

    config: Any = SimpleNamespace(getoption=lambda name: False)
    conftest.pytest_collection_modifyitems(config, [item("proves"), item("proven_by_more"), item("long")])
    assert found == skipped


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.table", ["a/__init__.py", "a/other.py", "a/table.py"]),
        (
            "a.loaded",
            ["a/__init__.py", "a/deep/__init__.py", "a/deep/one.py", "a/deep/two.py", "a/loaded/far/three.py"],
        ),
        ("a/page.md", ["a/page.md"]),
    ],
)
def test_a_proof_depends_on_what_it_names_and_imports_nowhere(name: str, found: list[str], tmp_path: Path) -> None:
    """A module, or all that is in a package; and what those import."""
    sources = {
        "constraints.txt": "",
        "test_proof.py": f"import pytest\n@pytest.mark.proves({name!r})\ndef test_a(): pass",
        "a/__init__.py": "",
        "a/table.py": "import a.other",
        "a/other.py": "",
        "a/deep/__init__.py": "",
        "a/deep/one.py": "from a.deep.two import x",
        "a/deep/two.py": "x = 1",
        "a/loaded/__init__.py": "",
        "a/loaded/far/__init__.py": "",
        "a/loaded/far/three.py": "import a.deep.one",
        "a/page.md": "a page that a test follows",
    }
    for each, text in sources.items():
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).write_text(text)
    assert set(found) <= set(sources_of("test_proof.py", tmp_path))
    assert ("a/other.py" in found) == ("a/other.py" in sources_of("test_proof.py", tmp_path))


def test_a_proof_of_what_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_proof.py").write_text("import pytest\n@pytest.mark.proves('a.gone')\ndef test_a(): pass")
    with pytest.raises(
        LookupError, match=r"test_proof\.py proves 'a\.gone', which is no module, no package and no file"
    ):
        sources_of("test_proof.py", tmp_path)


def test_a_proof_that_is_not_there_has_no_digest(proof: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.py"):
        digest_of("nothing.py", tmp_path)


def report(proof: str, passed: bool, when: str = "call") -> Any:
    return SimpleNamespace(user_properties=[("proves", proof)], when=when, passed=passed)


def test_only_what_passed_whole_is_recorded_and_what_did_not_run_is_kept(tmp_path: Path) -> None:
    kept, passed, failed, broken = "kept.py", "setup.py", "tests/conftest.py", "tests/support/proofs.py"
    record = tmp_path / "proven.json"
    record.write_text(json.dumps({kept: "kept", passed: "old", failed: "stale", broken: "stale"}))
    recorder = Recorder(record)
    recorder.pytest_runtest_logreport(report(passed, True))
    recorder.pytest_runtest_logreport(report(failed, True))
    recorder.pytest_runtest_logreport(report(failed, False))
    recorder.pytest_runtest_logreport(report(broken, True))
    recorder.pytest_runtest_logreport(report(broken, False, when="setup"))
    recorder.pytest_sessionfinish()
    assert recorded(record) == {kept: "kept", passed: digest_of(passed)}


def test_the_record_names_the_files_of_proofs_and_a_proof_sees_the_engine_and_what_judges_it() -> None:
    """A name in the record that no proof has would stand there for ever and prove nothing."""
    marked = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "tests").rglob("test_*.py")
        if file != Path(__file__) and "mark.proves" in file.read_text()
    }
    assert set(recorded()) <= marked
    sampled = {f"tests/embedded/test_{name}.py" for name in ("speculative_sampling", "verify_statistics")}
    raced = {f"tests/embedded/test_{name}.py" for name in ("gumbel_coupling", "race")}
    drafting = {f"tests/embedded/test_{name}.py" for name in ("greedy_grid", "graphs", "differential")}
    others = {
        "tests/embedded/test_fused_blocks.py",
        "tests/bench/test_bench_robustness.py",
        "tests/http/test_behind_a_router.py",
        "tests/scripts/test_gpu_kit.py",
        "tests/sglang/test_plugin_absent.py",
        "tests/sglang/test_plugin_real.py",
        "tests/sglang/test_plugin_real_drafts.py",
        "tests/sglang/test_plugin_names.py",
    }
    trained = {
        f"tests/trainer/test_{name}.py" for name in ("draft_side", "mixed_families", "mixed_weights", "mtp_of_families")
    }
    served = {f"tests/sglang/test_real_{name}.py" for name in ("families", "fp8", "nodes", "older", "routed_experts")}
    runs = {f"tests/e2e/test_{name}_run.py" for name in ("engine_faults", "mixed_families", "routing_replay")}
    runs |= {
        "tests/agents/test_calculator_page.py",
        "tests/scripts/test_launch_scripts.py",
        "tests/sglang/test_real_families_run.py",
    }
    assert marked == sampled | raced | drafting | trained | served | runs | others
    drafters = (ROOT / "rollout" / "embedded" / "drafters").glob("*.py")
    for proof in drafting:  # a core loads a drafter by the name in a table
        assert {file.relative_to(ROOT).as_posix() for file in drafters} <= set(sources_of(proof))
    for proof in sampled | raced:
        judge = "tests/support/statistics.py" if proof in sampled else "rollout/embedded/verification/race.py"
        needed = {"rollout/embedded/verification/walk.py", "rollout/embedded/uniforms.py", judge}
        assert needed <= set(sources_of(proof))


def test_no_package_is_pinned_twice() -> None:
    names = [line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()]
    assert sorted(set(names)) == sorted(names)
