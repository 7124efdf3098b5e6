"""``bench sglang`` on servers that are the fake: what it asks of them, compares and reports."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slime_spec.bench import run_bench
from slime_spec.bench.race import Answer
from slime_spec.bench.rows import BenchOptions, Row
from slime_spec.bench.sglang import offload, push, restart
from slime_spec.bench.sglang.benchmark import PARTS
from slime_spec.bench.sglang.counters import adds_up, within_budget
from slime_spec.bench.sglang.exactness import exactly, share_of_equals
from slime_spec.bench.sglang.replies import prompts_of, replies
from slime_spec.bench.sglang.speed import speed_comparison
from slime_spec.bench.timing import Timed
from slime_spec.errors import ConfigError
from slime_spec.interfaces import load_choice
from slime_spec.types import GeneratedSample, SpecCounters
from slime_spec.weights.messages import Side
from slime_spec.weights.run import PushReport
from tests.support.sglang_checkpoints import make_draft, make_target

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "support" / "sglang_fake"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> BenchOptions:
    folder = tmp_path_factory.mktemp("bench")
    target = make_target(folder / "target")
    draft = make_draft(folder / "eagle3", target, "EAGLE3")
    return BenchOptions(
        model=target, draft=str(draft), seeds=(0,), num_rounds=2, num_new_tokens=20, num_prompts=3, num_gpus=0
    )


@pytest.fixture(autouse=True)
def _fake_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m sglang.launch_server`` is the fake, whose rounds accept two of three drafts."""
    monkeypatch.setenv("PYTHONPATH", f"{FAKE}{os.pathsep}{ROOT}")
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _forget_replies() -> Iterator[None]:
    """Exactness and counters are about the same replies."""
    yield
    replies.cache_clear()


def measured(part: str, options: BenchOptions) -> dict[str, Row]:
    rows: list[Row] = load_choice("--only", PARTS, part)(options)
    return by_id(rows)


def sample(num_tokens: int, histogram: tuple[int, ...], token: int = 0) -> GeneratedSample:
    rounds = sum(histogram)
    spec = SpecCounters(num_rounds=rounds, num_proposed=3 * rounds, histogram=histogram)
    return GeneratedSample("g", 0, (token,) * num_tokens, (0.0,) * num_tokens, "length", 0, 4, spec)


def test_prompts_are_questions_and_texts_to_repeat(options: BenchOptions) -> None:
    prompts = prompts_of(replace(options, num_prompts=5))
    assert len(prompts) == len(set(prompts)) == 5
    shortest, longest = sorted(map(len, prompts))[0], sorted(map(len, prompts))[-1]
    assert longest > 3 * shortest


def test_exactness_compares_every_algorithm_with_none_and_with_the_embedded_engine(options: BenchOptions) -> None:
    rows = measured("exactness", options)
    spec = {f"exactness.{name}.equals_plain" for name in ("ngram", "standalone", "eagle3")}
    all_of_them = {f"exactness.{name}.equals_embedded" for name in ("none", "ngram", "standalone", "eagle3")}
    assert rows.keys() == spec | all_of_them
    # The fake's next token does not depend on speculation, and is not the checkpoint's.
    assert all(rows[id].value == 1.0 and rows[id].holds for id in spec)
    assert all(rows[id].value == 0.0 and rows[id].holds is False for id in all_of_them)


def test_fewer_bits_are_held_to_nothing(options: BenchOptions) -> None:
    assert exactly(options, "a", "", 0.5).holds is False
    assert exactly(replace(options, dtype="bfloat16"), "a", "", 0.5).holds is None


def test_a_reply_that_differs_in_one_token_is_not_equal() -> None:
    assert share_of_equals([sample(4, ()), sample(4, (), token=1)], [sample(4, ()), sample(4, ())]) == 0.5


def test_counters_of_the_fake_add_up_and_are_not_the_embedded_engines(options: BenchOptions) -> None:
    rows = measured("counters", options)
    for name in ("ngram", "standalone", "eagle3"):
        assert rows[f"counters.{name}.add_up"].holds
        # 20 tokens: the prefill's and seven rounds of three, the last of them cut off.
        assert rows[f"counters.{name}.accept_length"].value == pytest.approx(20 / 7)
    assert rows["counters.eagle3.same_histogram"].holds is False
    assert rows["counters.standalone.same_histogram"].holds is None
    assert "counters.ngram.same_histogram" not in rows


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        (sample(9, (1, 2, 1)), True),  # 1 + 4 rounds + 4 accepted
        (sample(8, (1, 2, 1)), True),  # the last round beyond the budget
        (sample(5, (1, 2, 1)), False),  # more beyond it than a round has
        (sample(10, (1, 2, 1)), False),  # tokens from nowhere
        (replace(sample(9, (1, 2, 1)), spec=SpecCounters(4, 11, (1, 2, 1))), False),
        (replace(sample(9, (1, 2, 1)), spec=SpecCounters(5, 15, (1, 2, 1))), False),
        (sample(1, ()), False),  # no round at all
    ],
)
def test_counters_add_up_or_do_not(found: GeneratedSample, holds: bool) -> None:
    assert adds_up(found, num_draft_tokens=4) is holds


def test_drafts_beyond_the_budget_are_taken_off_the_round_that_may_have_had_them() -> None:
    assert within_budget(sample(9, (1, 2, 1))) == [(1, 2, 1)]
    assert within_budget(sample(8, (1, 2, 1))) == [(2, 1, 1), (1, 3)]
    assert within_budget(sample(7, (1, 2, 1))) == [(2, 2)]


def by_id(rows: list[Row]) -> dict[str, Row]:
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: row for row in rows}


def test_a_push_is_timed_and_changes_its_own_side_alone(options: BenchOptions) -> None:
    # The fake joins no process group.
    rows = by_id(push.sided_rows(options, ("tensor",)) + push.disk_rows(options))
    for where in ("tensor.target", "tensor.draft", "disk.target"):
        assert rows[f"push.{where}.first_s"].value > 0
        assert rows[f"push.{where}.seconds"].value > 0
        assert rows[f"push.{where}.gb_per_s"].value > 0
        assert rows[f"push.{where}.changed"].holds
    assert rows["push.tensor.target.strays"].holds
    assert rows["push.tensor.draft.strays"].holds
    assert "push.disk.target.strays" not in rows


def pushed(side: Side, changed: set[str]) -> push.Pushed:
    """A server of three tensors a side, of which ``changed`` did; the embedding is shared."""
    before = {each: {f"{each}.{name}": name for name in ("embed", "fc", "rotary")} for each in push.SIDES}
    after = {
        each: {name: sum + "!" if name in changed else sum for name, sum in sums.items()}
        for each, sums in before.items()
    }
    return push.Pushed(side, [PushReport(1, 2.0, 10**9, 3, ""), PushReport(2, 0.5, 10**9, 3, "")], before, after)


@pytest.mark.parametrize(
    ("side", "changed", "share", "strays"),
    [
        ("target", {"target.embed", "target.fc", "draft.embed"}, 1.0, 0),
        ("target", {"target.embed", "draft.embed"}, 0.5, 0),
        ("target", {"target.embed", "target.fc", "draft.fc"}, 1.0, 1),
        ("draft", {"draft.fc"}, 1.0, 0),
        ("draft", {"draft.fc", "target.fc"}, 1.0, 1),
        ("draft", set(), 0.0, 0),
    ],
)
def test_a_push_that_misses_its_side_or_hits_the_other_is_told(
    options: BenchOptions, side: Side, changed: set[str], share: float, strays: int
) -> None:
    rows = by_id(push.transport_rows(options, "tensor", [pushed(side, changed)], frozenset({"draft.embed"})))
    assert rows[f"push.tensor.{side}.changed"].value == share
    assert rows[f"push.tensor.{side}.changed"].holds is (share == 1.0)
    assert rows[f"push.tensor.{side}.strays"].value == strays
    assert rows[f"push.tensor.{side}.strays"].holds is (strays == 0)
    assert rows[f"push.tensor.{side}.gb_per_s"].value == 2.0


def test_what_a_draft_shares_with_its_target_is_what_equals_it() -> None:
    target, draft = {"embed": "1", "norm": "2"}, {"draft.embed": "1", "draft.norm": "3"}
    assert push.shared_with_target("EAGLE3", target, draft) == {"draft.embed"}
    assert push.shared_with_target("STANDALONE", target, draft) == set()


def test_stale_drafts_are_pushed_and_acceptance_is_told_after_every_push(options: BenchOptions) -> None:
    rows = measured("stale", options)
    moves = ("draft_moved", "draft_back", "target_moved", "target_back")
    names = [f"eagle3.{move}" for move in moves] + ["standalone.target_moved", "standalone.draft_followed"]
    assert {f"stale.{name}.share" for name in names} < rows.keys()
    # The fake accepts the same whatever it was sent: nothing is stale, and the rows say so.
    assert {rows[f"stale.{name}.share"].value for name in names} == {1.0}
    assert rows["stale.eagle3.draft_moved.share"].holds is False
    assert rows["stale.eagle3.draft_back.share"].holds is True
    assert rows["stale.eagle3.target_moved.share"].holds is None
    assert rows["stale.standalone.target_moved.share"].holds is False


def test_a_killed_server_comes_back_with_what_was_pushed_and_loses_nothing(options: BenchOptions) -> None:
    rows = measured("restart", replace(options, num_new_tokens=200))
    assert rows["restart.interrupted"].value == 3
    assert (rows["restart.lost"].value, rows["restart.lost"].holds) == (0, True)
    assert rows["restart.equal"].holds
    assert rows["restart.weights"].holds
    assert 0 < rows["restart.first_token_s"].value <= rows["restart.last_reply_s"].value


def test_replies_that_are_lost_or_cut_and_weights_that_did_not_come_back_are_told(options: BenchOptions) -> None:
    found = restart.Recovery([sample(20, ())] * 3, [sample(20, (1,)), sample(19, (1,)), None], 0.5, 1.0, 2.0)
    rows = by_id(restart.recovery_rows(options, found))
    assert (rows["restart.lost"].value, rows["restart.lost"].holds) == (2, False)
    assert rows["restart.equal"].value == pytest.approx(1 / 3)
    assert rows["restart.interrupted"].value == 1
    assert not any(rows[f"restart.{name}"].holds for name in ("equal", "weights"))


def test_a_kill_that_came_too_late_proves_nothing(options: BenchOptions) -> None:
    found = restart.Recovery([sample(20, ())], [sample(20, (1,))], 1.0, 1.0, 2.0)
    assert by_id(restart.recovery_rows(options, found))["restart.interrupted"].holds is False


def test_a_draft_survives_offloads(options: BenchOptions) -> None:
    rows = measured("offload", options)
    assert rows["offload.release_s"].value > 0
    assert rows["offload.resume_s"].value > 0
    assert rows["offload.draft_unchanged"].holds
    assert rows["offload.equal"].holds
    assert "offload.freed" not in rows  # nothing is, on a CPU


def test_a_draft_that_an_offload_changed_is_told(options: BenchOptions) -> None:
    before = offload.State({"a": "1", "b": "2"}, [sample(4, (1, 1))])
    after = offload.State({"a": "1", "b": "3"}, [sample(4, (1, 1))])
    rows = by_id(offload.offload_rows(options, [offload.Offload(0.1, 0.2, 0)], before, after))
    assert (rows["offload.draft_unchanged"].value, rows["offload.draft_unchanged"].holds) == (0.5, False)
    assert rows["offload.equal"].holds


def test_speed_races_two_servers_at_every_batch_size(options: BenchOptions) -> None:
    rows = measured("speed", replace(options, num_new_tokens=200, batch_sizes=(4,), num_rounds=1))
    for name in ("plain", "speculating"):
        assert rows[f"speed.b4.{name}.tokens_per_s"].value > 0
        assert rows[f"speed.b4.{name}.tokens_per_cpu_s"].value > 0
        assert "no speed of SGLang's" in rows[f"speed.b4.{name}.tokens_per_s"].what
    assert rows["speed.b4.speculating.tokens_per_pass"].value == pytest.approx(199 / 67)
    assert rows["speed.b4.ratio"].value > 0
    assert rows["speed.b4.decode_ratio"].value > 0


def test_speeds_of_a_gpu_are_told_by_the_clock_alone(options: BenchOptions) -> None:
    slow, fast, first = (Answer([(1,) * count], count) for count in (21, 21, 1))
    times = {
        "plain": [Timed(5.0, slow, 1.0)],
        "speculating": [Timed(3.0, fast, 1.0)],
        "prefill": [Timed(1.0, first, 1.0)],
    }
    rows = by_id(speed_comparison(replace(options, num_gpus=1), 8, times))
    assert rows["speed.b8.ratio"].value == pytest.approx(5 / 3)
    assert rows["speed.b8.decode_ratio"].value == pytest.approx(2.0)
    assert not [id for id in rows if "cpu" in id]
    assert "SGLang's" not in rows["speed.b8.plain.tokens_per_s"].what


def bench(options: BenchOptions, *argv: str) -> int:
    given = ["--model", str(options.model), "--draft", options.draft, "--num-gpus", "0", "--num-prompts", "2"]
    return run_bench("sglang", [*given, *argv])


@pytest.mark.parametrize(
    ("argv", "setting", "says"),
    [
        (("--algorithms", "NONE", "EAGEL3"), "--algorithms", "Did you mean 'EAGLE3'"),
        (("--algorithms", "NONE", "NGRAM", "--only", "push"), "--algorithms", "drafts with weights"),
        (("--draft", "/nowhere"), "speculative.draft_model_path", "config.json"),
        (("--only", "sped"), "--only", "Did you mean 'speed'"),
        (("--batch-sizes", "8", "0"), "--batch-sizes", "at least 1"),
        (("--sglang-python", "/nowhere/python"), "sglang_server.python", "must be a Python that runs"),
    ],
)
def test_a_mistake_is_refused_before_a_server_starts(
    options: BenchOptions, argv: tuple[str, ...], setting: str, says: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        bench(options, *argv)
    assert refused.value.setting == setting
    assert says in str(refused.value)


def test_without_a_gpu_the_environment_must_say_so(options: BenchOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE")
    with pytest.raises(ConfigError, match=r"install-sglang-cpu\.sh"):
        bench(options, "--only", "exactness")


def test_the_command_writes_the_rows_of_the_parts_that_were_asked_for(options: BenchOptions, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    argv = ("--only", "counters", "--algorithms", "NGRAM", "--new-tokens", "8", "--json", str(file))
    assert bench(options, *argv) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["id"] for row in rows} == {"counters.ngram.add_up", "counters.ngram.accept_length"}


def test_every_part_is_a_function_that_exists() -> None:
    assert all(callable(load_choice("--only", PARTS, part)) for part in PARTS)
