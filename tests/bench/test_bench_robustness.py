"""``slime-spec bench robustness``: hostile inputs of every kind are accepted or refused in words, and counted."""

import json
import time
from pathlib import Path
from random import Random

import pytest

from slime_spec.bench.robustness.benchmark import KINDS
from slime_spec.bench.robustness.fuzzer import Case, Kind, NanAnswer, Outcome, finite_json
from slime_spec.bench.rows import BenchOptions, Row
from slime_spec.errors import ConfigError
from slime_spec.interfaces import load_choice
from slime_spec.launch.cli import main

QUICK = BenchOptions(seeds=(1_000_000,), count=100, seconds=15)
WHOLE = BenchOptions(seeds=(2_000_000,), count=1_000, seconds=120)


class Scripted:
    """Answers each input as the input itself says."""

    def __init__(self, _: Path) -> None:
        self.closed = False

    def make(self, random: Random) -> Case[str]:
        word = random.choice(["fine", "no", "refused", "crash", "exit", "hang", "nan"])
        return Case(f"the word {word}", word)

    def attempt(self, case: Case[str]) -> bool:
        answers = {"crash": KeyError("x"), "exit": SystemExit(3), "nan": NanAnswer("logprob is NaN")}
        if case.value in answers:
            raise answers[case.value]
        if case.value == "refused":
            raise ConfigError("word", "must be fine", case.value, "Say fine.")
        if case.value == "hang":
            try:
                while True:
                    time.sleep(1)
            except Exception:  # noqa: BLE001  (as a product that swallows whatever comes)
                return True
        return case.value == "fine"

    def close(self) -> None:
        self.closed = True


def test_every_input_is_counted_by_what_became_of_it() -> None:
    kind = Kind("scripted", "words", 60, Scripted, limit_s=0.01)
    words = [Scripted(Path()).make(Random(f"scripted {seed}")).value for seed in range(60)]
    counts = kind.tried(60)
    assert counts.tried == 60
    assert counts.accepted == words.count("fine") > 0
    assert counts.refused == words.count("no") + words.count("refused")
    assert [each.seed for each in counts.of(Outcome.HANG)] == [n for n, word in enumerate(words) if word == "hang"]
    assert [each.seed for each in counts.of(Outcome.NAN)] == [n for n, word in enumerate(words) if word == "nan"]
    crashes = counts.of(Outcome.TRACEBACK)
    assert [each.seed for each in crashes] == [n for n, word in enumerate(words) if word in ("crash", "exit")]
    assert {each.what for each in crashes} == {"the word crash", "the word exit"}
    assert any("KeyError: 'x' (test_bench_robustness.py:" in each.error for each in crashes)


def test_a_seed_alone_makes_a_failed_input_again() -> None:
    kind = Kind("scripted", "words", 60, Scripted, limit_s=0.01)
    first = kind.tried(60).failures[0]
    assert kind.tried(1, first.seed).failures == (first,)


def test_a_fault_is_a_row_that_does_not_hold_and_names_the_seed() -> None:
    kind = Kind("scripted", "words", 60, Scripted, limit_s=0.01)
    rows = {row.id: row for row in kind.measure(BenchOptions(seeds=(0,)))}
    assert rows["robustness.scripted.tried"].value == 60
    assert rows["robustness.scripted.tracebacks"].holds is False
    assert (
        f"seed {kind.tried(60).of(Outcome.TRACEBACK)[0].seed}: the word" in rows["robustness.scripted.tracebacks"].what
    )


def test_no_input_is_tried_once_the_time_is_over() -> None:
    assert Kind("scripted", "words", 60, Scripted).tried(60, seconds=0).tried == 0


def test_an_answer_with_a_number_that_is_not_finite_is_found() -> None:
    assert finite_json('{"logprobs": [-1.5]}') == {"logprobs": [-1.5]}
    with pytest.raises(NanAnswer, match="NaN"):
        finite_json('{"logprobs": [NaN]}')
    with pytest.raises(NanAnswer, match="Infinity"):
        finite_json("[-Infinity]")


def test_the_command_writes_the_counts_and_ends_with_code_0(tmp_path: Path) -> None:
    argv = ["robustness", "--kind", "commands", "--count", "5", "--seed", "17", "--json", str(tmp_path / "rows.json")]
    assert main(["bench", *argv]) == 0
    report = json.loads((tmp_path / "rows.json").read_text())
    assert report["seeds"] == [17]
    assert {row["id"]: row["value"] for row in report["rows"]}["robustness.commands.tried"] == 5


@pytest.mark.parametrize(("flag", "value"), [("--count", "0"), ("--seconds", "nan"), ("--kind", "comands")])
def test_a_wrong_flag_is_refused(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "robustness", flag, value]) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("name", KINDS)
def test_hostile_inputs_are_accepted_or_refused_in_words(name: str) -> None:
    assert_no_faults(name, QUICK)


@pytest.mark.long
@pytest.mark.proves("slime_spec", "rollout.embedded", "conf")
@pytest.mark.parametrize("name", KINDS)
def test_many_hostile_inputs_are_accepted_or_refused_in_words(name: str) -> None:
    assert_no_faults(name, WHOLE)


def assert_no_faults(name: str, options: BenchOptions) -> None:
    rows: list[Row] = load_choice("kind", KINDS, name)(options)
    assert not [row.what for row in rows if row.holds is False]
    values = {row.id: row.value for row in rows}
    assert values[f"robustness.{name}.refused"] > 0
