"""The kit that measures on a bare GPU machine: its loads, its menus, the ledger, and a rehearsal of it all on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import slime_spec.bench
from slime_spec.bench.rows import Benchmark
from slime_spec.interfaces import load_choice

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "gpu"))  # as a script's own folder is found

import device_tests  # noqa: E402
import ledger  # noqa: E402
import menus  # noqa: E402
import pack  # noqa: E402
import prove  # noqa: E402
import rl_steps  # noqa: E402
import unpack  # noqa: E402
from menus import MENUS, REHEARSED, REPORT, Part  # noqa: E402

LEAVES_A_REPORT = "import sys, json; open(sys.argv[1], 'w').write(json.dumps({'rows': [json.loads(sys.argv[2])]}))"


def row(figure: str, value: float = 1.0, holds: bool | None = None) -> dict[str, Any]:
    return {"id": figure, "what": "a figure", "value": value, "unit": "x", "reach": "", "holds": holds}


def part(name: str, code: str, *words: str, limit_s: int = 60) -> Part:
    command = ("-c", code, REPORT, *words)
    return Part(name, limit_s, command, command)


def good(name: str, figure: str) -> Part:
    return part(name, LEAVES_A_REPORT, json.dumps(row(figure)))


def visited(parts: list[Part], folder: Path, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> dict[str, Any]:
    monkeypatch.setitem(MENUS, "mine", tuple(parts))
    monkeypatch.setattr(prove, "card", lambda device: ("a card", {"torch": "2.11.0"}))
    (folder / "stand-ins").mkdir(exist_ok=True)
    options = {"device": "cpu", "only": None, "deadline": 500.0, "out": folder, "revision": "abc", **changed}
    report = prove.visit("mine", Namespace(**options))
    assert json.loads((folder / "mine.json").read_text()) == report
    return report


def test_a_part_that_fails_or_hangs_is_told_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [
        part("broken", "raise SystemExit('no such device')"),
        part("hanging", "import time; time.sleep(600)", limit_s=1),
        good("good", "a.b"),
    ]
    report = visited(parts, tmp_path, monkeypatch)
    failures = {each["part"]: each["failure"] for each in report["parts"]}
    assert failures["broken"].startswith("exit code 1: ")
    assert "no such device" in failures["broken"]
    assert failures["hanging"].startswith("no end in 1 s")
    assert failures["good"] == ""
    assert report["parts"][-1]["rows"] == [row("a.b")]


def test_a_figure_that_misses_its_bound_is_a_figure_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = row("a.b", holds=False)
    (measured,) = visited([part("slow", LEAVES_A_REPORT + "; sys.exit(1)", json.dumps(missed))], tmp_path, monkeypatch)[
        "parts"
    ]
    assert (measured["failure"], measured["rows"]) == ("", [missed])


def test_what_a_part_left_before_it_failed_is_kept_but_not_an_older_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = part("half", LEAVES_A_REPORT + "; sys.exit(3)", json.dumps(row("a.b")))
    (measured,) = visited([half], tmp_path, monkeypatch)["parts"]
    assert measured["failure"].startswith("exit code 3")
    assert measured["rows"] == [row("a.b")]
    (measured,) = visited([part("half", "raise SystemExit(4)")], tmp_path, monkeypatch)["parts"]
    assert measured["rows"] == []


def test_a_part_that_would_outlast_the_visit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = part("long", "raise SystemExit(1)", limit_s=400)
    report = visited([long, good("good", "a.b")], tmp_path, monkeypatch, deadline=120.0)
    assert report["left_out"] == ["long"]
    assert [each["part"] for each in report["parts"]] == ["good"]


def test_a_part_with_most_of_its_limit_left_has_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = part("hanging", "import time; time.sleep(600)", limit_s=3)
    report = visited([hanging], tmp_path, monkeypatch, deadline=2.0)
    assert report["parts"][0]["failure"].startswith("no end in 2 s")


def entry(part: str, date: str) -> dict[str, Any]:
    return {"part": part, "date": date}


def test_a_visit_takes_first_what_no_visit_to_this_card_has_measured_and_then_the_oldest() -> None:
    known = {
        "a": {"H200": entry("new", "2026-12-03"), "H100": entry("old", "2026-12-09")},
        "b": {"H200": entry("old", "2026-12-01")},
        "c": {"H200": entry("old", "2026-12-02")},
    }
    assert ledger.in_turn(["new", "old", "never"], known, "H200") == ["never", "old", "new"]
    assert ledger.in_turn(["new", "old", "never"], known, "H100") == ["new", "never", "old"]


def visit(card: str, value: float, date: str, device: str = "cuda") -> dict[str, Any]:
    measured = {"part": "engine plain", "command": "-m slime_spec", "failure": "", "rows": [row("a.b", value)]}
    versions = {"torch": "2.11.0"}
    return {
        "device": device,
        "card": card,
        "revision": "abc",
        "date": date,
        "versions": versions,
        "parts": [measured],
    }


def test_the_ledger_keeps_each_cards_newest_value_with_what_repeats_it() -> None:
    found = ledger.entered({}, visit("H100", 1.0, "2026-12-01"))
    found = ledger.entered(found, visit("H200", 2.0, "2026-12-02"))
    found = ledger.entered(found, visit("H200", 3.0, "2026-12-03"))
    assert {card: each["value"] for card, each in found["a.b"].items()} == {"H100": 1.0, "H200": 3.0}
    told = {"date": "2026-12-03", "revision": "abc", "versions": {"torch": "2.11.0"}, "command": "-m slime_spec"}
    assert told.items() <= found["a.b"]["H200"].items()
    assert found["a.b"]["H200"]["unit"] == "x"


def test_a_rehearsal_is_no_visit() -> None:
    with pytest.raises(ValueError, match="no visit to a GPU"):
        ledger.entered({}, visit("a CPU", 1.0, "2026-12-01", device="cpu"))


def test_every_entry_of_the_ledger_says_where_when_and_how() -> None:
    wanted = ledger.entered({}, visit("H100", 1.0, "2026-12-01"))["a.b"]["H100"].keys()
    for figure, cards in ledger.read().items():
        assert all(each.keys() == wanted for each in cards.values()), figure


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_benchmark_of_a_menu_takes_the_arguments_it_is_given(device: str, tmp_path: Path) -> None:
    """What is not a flag is found here and not on the visit."""
    commands = [each.command(device, tmp_path / "r.json", tmp_path) for parts in MENUS.values() for each in parts]
    benches = [words[3:] for words in commands if tuple(words[:3]) == menus.BENCH]
    assert len(benches) > len(commands) / 2
    for name, *argv in benches:
        bench: Benchmark = load_choice("bench", slime_spec.bench.BENCHES, name)
        options = slime_spec.bench.parse_options(name, bench, argv)
        assert len(options.parts) == 1
        assert options.num_gpus == (1 if device == "cuda" else 0)
    scripts = [ROOT / words[0] for words in commands if words[0] != "-m"]
    assert all(path.is_file() for path in scripts)


def test_a_menu_fits_into_a_visit_in_its_first_parts() -> None:
    """Nine minutes; what does not fit comes first on the next visit."""
    for name, parts in MENUS.items():
        assert max(each.limit_s for each in parts) <= 240, name
        assert len({each.name for each in parts}) == len(parts)


def test_tests_are_counted_with_the_names_of_those_that_fail(tmp_path: Path) -> None:
    outcomes = tmp_path / "outcomes.jsonl"
    lines = [
        {"test": "tests/embedded/test_a.py::test_x", "outcome": "passed", "why": ""},
        {"test": "tests/embedded/test_a.py::test_y", "outcome": "failed", "why": "line\nE  assert 1 == 2"},
        {"test": "tests/embedded/test_b.py::test_z", "outcome": "skipped", "why": ""},
    ]
    outcomes.write_text("".join(json.dumps(line) + "\n" for line in lines))
    passed, failed, _ = device_tests.rows_of(outcomes, "sampling_laws", ended=True)
    assert (passed.id, failed.id) == ("sampling_laws.passed", "sampling_laws.failed")
    assert (passed.value, failed.value, failed.holds, failed.what) == (1, 1, False, "test_a.py::test_y")
    told = "FAILED tests/embedded/test_a.py::test_y\n    line\n    E  assert 1 == 2"
    assert device_tests.failures_of(outcomes) == told


def test_tests_that_are_ended_tell_what_they_had_found(tmp_path: Path) -> None:
    tests = tmp_path / "test_slow.py"
    tests.write_text("import time\ndef test_a(): assert 1 == 2\ndef test_b(): pass\ndef test_c(): time.sleep(600)\n")
    outcomes = tmp_path / "outcomes.jsonl"
    words = ["-q", "-p", "no:cacheprovider", "-p", "outcomes", "--outcomes", str(outcomes), "--rootdir", str(tmp_path)]
    ended = device_tests.run_tests([*words, str(tests)], limit_s=8)
    passed, failed, whole = device_tests.rows_of(outcomes, "device_tests", ended)
    assert (passed.value, failed.value) == (1, 1)
    assert not whole.holds, "a test that did not run is no test that passed"
    assert "assert 1 == 2" in device_tests.failures_of(outcomes)


def test_a_run_that_does_not_end_tells_where_its_processes_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every thread of every Python process, and the ends of Ray's logs."""
    monkeypatch.setattr(rl_steps, "STACK_EVERY_S", 1)
    stacks = tmp_path / "0s"
    waits = "import threading\ndef for_ever(): threading.Event().wait()\nfor_ever()"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", waits], env=rl_steps.tells_its_stacks(stacks), timeout=4)
    logs = stacks / "ray/session_latest/logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("no room")
    (logs / "dashboard.log").write_text("all is well")
    told = rl_steps.standing(stacks)
    assert "in for_ever" in told
    assert told.endswith("== end of raylet.out\nno room")


def test_settings_of_the_runs_come_last_and_win() -> None:
    options = Namespace(num_rollout=1, num_gpus=1, policy=None, draft=None, settings=["engine.dtype=float32"])
    for speculates in (True, False):
        words = rl_steps.arguments(speculates, options)
        assert words[-1] == "engine.dtype=float32"
        assert "engine.dtype=bfloat16" in words


def test_what_is_packed_is_pinned() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    for name in (*pack.PACKAGES, pack.FROM_SOURCE, "ray"):
        assert pack.pinned(constraints, name).startswith(f"{name}==")
    assert all(line.count("==") == 1 for line in (ROOT / "scripts/gpu/sglang.txt").read_text().split())
    with pytest.raises(SystemExit, match="pins no torchvision"):
        pack.pinned(constraints, "torchvision")


def test_a_load_that_cannot_be_carried_is_named() -> None:
    assert pack.too_large({"a": pack.LIMIT_BYTES, "s": pack.LIMIT_BYTES + 1}) == ["s"]


def test_what_was_packed_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The halves of the model's wheel come one at a time; an archive of ray's is this project's, another SGLang's."""
    loads, home = tmp_path / "loads", tmp_path / "home"
    for name, value in (("LOADS", loads), ("HOME", home), ("SITE", home / "site"), ("SGLANG", home / "sglang")):
        monkeypatch.setattr(unpack, name, value)
    monkeypatch.setattr(unpack, "WHEELS", home / "wheels")
    monkeypatch.setattr(unpack, "SGLANG_PYTHON", home / "sglang-python")
    for name in ("ray", "kernels"):
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "__init__.py").write_text(name)
        (loads / "a").mkdir(parents=True, exist_ok=True)
        pack.compress(tmp_path / name, loads / "a" / f"{name}.tar.xz")
    wheel = tmp_path / "model.whl"
    wheel.write_bytes(bytes(range(101)))
    halves = [loads / name / wheel.name for name in ("m1", "m2")]
    for half in halves:
        half.parent.mkdir()
    pack.halve(wheel, (half.parent for half in halves))
    second = halves[1].read_bytes()
    halves[1].unlink()
    assert unpack.main() == 0
    assert (home / "site/ray/__init__.py").read_text() == "ray"
    assert (home / "sglang/kernels/__init__.py").read_text() == "kernels"
    assert not (home / "wheels" / wheel.name).exists()
    halves[0].unlink()
    halves[1].write_bytes(second)
    for archive in (loads / "a").iterdir():
        archive.write_bytes(b"not looked at again")
    assert unpack.main() == 0
    assert (home / "wheels" / wheel.name).read_bytes() == wheel.read_bytes()


def test_the_kept_files_of_a_wheel_keep_their_modes_and_the_others_are_gone(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "ray.whl", "w") as archive:
        entry = zipfile.ZipInfo("ray/core/raylet")
        entry.external_attr = 0o755 << 16
        archive.writestr(entry, "binary")
        archive.writestr("ray/rllib/big.py", "x")
        archive.writestr("ray/core/index.js.map", "x")
    kept = pack.extract([tmp_path / "ray.whl"], tmp_path / "kept", pack.keeps_of_ray)
    assert [path.name for path in kept.rglob("*") if path.is_file()] == ["raylet"]
    assert (kept / "ray/core/raylet").stat().st_mode & 0o777 == 0o755
    pack.compress(kept, tmp_path / "ray.tar.xz")
    with tarfile.open(tmp_path / "ray.tar.xz") as tar:
        assert tar.getmember("ray/core/raylet").mode & 0o777 == 0o755


@pytest.mark.long
@pytest.mark.proves(
    "scripts.gpu",
    "slime_spec",
    "rollout",
    "trainer_bridge",
    "conf",
    "tests.embedded.test_tree_attention",
    "tests.embedded.test_verify_statistics",
)
@pytest.mark.parametrize("menu", REHEARSED)
def test_a_rehearsal_on_the_cpu_measures_every_part(menu: str, tmp_path: Path) -> None:
    """The very commands of a visit, with small sizes. A figure without a unit says why it was not measured."""
    assert prove.main([menu, "--device", "cpu", "--out", str(tmp_path), "--deadline", "1000"]) == 0
    report = json.loads((tmp_path / f"{menu}.json").read_text())
    assert report["left_out"] == []
    assert {each["part"] for each in report["parts"]} == {each.name for each in MENUS[menu]}
    for each in report["parts"]:
        assert each["rows"], each["part"]
        assert not [row for row in each["rows"] if row["value"] is None and row["unit"]], each["part"]
        assert any(row["value"] is not None for row in each["rows"]), each["part"]
