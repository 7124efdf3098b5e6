"""The benchmark of what speculation pays: what its scenarios ask, which sides it holds up, and what its rows say."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from slime_spec.bench import run_bench
from slime_spec.bench.pays.benchmark import DEFAULTS, measure_scenario
from slime_spec.bench.pays.scenarios import LONGEST_IN_JOB, Scenario, Waves, fixed, requests, scenarios
from slime_spec.bench.pays.sides import (
    Result,
    drawn_order,
    generate,
    knowing,
    repeat,
    side_configs,
    started_cores,
)
from slime_spec.bench.pays.verdict import Where, rows_of
from slime_spec.bench.rows import BenchOptions, Row
from slime_spec.bench.timing import Timed
from slime_spec.config.tree import EngineConfig
from slime_spec.errors import ConfigError
from slime_spec.launch.cli import main
from slime_spec.launch.compose import composed
from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.types import GeneratedSample, SpecCounters
from tests.support.embedded_harness import random_prompt
from tests.support.tiny_drafts import EAGLE3, make_tiny_draft
from tests.support.tiny_policy import make_tiny_policy

PROMPTS = tuple(random_prompt(6 + i, seed=i) for i in range(10))
FOUR = Scenario("4", num_groups=2, num_samples=2, length=fixed(12), untrained=1.3, trained=1.7)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> BenchOptions:
    folder = tmp_path_factory.mktemp("pays")
    policy = make_tiny_policy(folder / "policy")
    draft = make_tiny_draft(folder / "draft", policy, {**EAGLE3, "vocab_size": 257})
    return BenchOptions(model=policy, draft=str(draft), seeds=(0,), num_rounds=2)


def asked(waves: Waves) -> list[tuple[object, ...]]:
    return [(r.group_id, r.prompt_token_ids, r.seeds, r.params) for wave in waves for r in wave]


@pytest.mark.parametrize(
    ("name", "waves", "groups", "samples", "longest", "ends"),
    [("64", 1, 8, 8, 40, True), ("8", 4, 1, 8, 40, True), ("4", 4, 1, 4, 40, True), ("1", 8, 1, 1, 40, True)],
)
def test_a_scenario_asks_for_so_many_sequences_at_once_of_such_a_length(
    name: str, waves: int, groups: int, samples: int, longest: int, ends: bool
) -> None:
    made = requests(scenarios(DEFAULTS.num_new_tokens)[name], PROMPTS, seed=0, repetition=1)
    assert [len(wave) for wave in made] == [groups] * waves
    for request in (request for wave in made for request in wave):
        assert len(set(request.seeds)) == samples
        assert (request.params.max_new_tokens, request.params.ignore_eos) == (longest, not ends)
        assert request.params.temperature == 1.0


def test_a_long_tails_lengths_are_lognormal_up_to_512() -> None:
    tail = scenarios(DEFAULTS.num_new_tokens)["64_tail"]
    drawn = [requests(tail, PROMPTS, seed=0, repetition=repetition)[0] for repetition in range(60)]
    lengths = [request.params.max_new_tokens for wave in drawn for request in wave]
    assert len(lengths) == 60 * 64
    assert all(request.params.ignore_eos and len(request.seeds) == 1 for wave in drawn for request in wave)
    below, above = statistics.NormalDist().cdf(-1.0), 1.0 - statistics.NormalDist().cdf(math.log(512 / 60))
    # Five standard deviations of shares of 3,840 draws are 0.04 at most; the seeds are fixed.
    assert statistics.median(lengths) == pytest.approx(60, abs=4)
    assert sum(length < 60 / math.e for length in lengths) / len(lengths) == pytest.approx(below, abs=0.04)
    assert lengths.count(512) / len(lengths) == pytest.approx(above, abs=0.01)
    assert max(lengths) == 512


def test_all_sides_are_asked_the_same_and_every_repetition_something_else() -> None:
    assert asked(requests(FOUR, PROMPTS, 0, 1)) == asked(requests(FOUR, PROMPTS, 0, 1))
    first, second, other = (requests(FOUR, PROMPTS, *each)[0] for each in ((0, 1), (0, 2), (1, 1)))
    assert {r.prompt_token_ids for r in first}.isdisjoint(r.prompt_token_ids for r in second)
    assert {r.seeds for r in first}.isdisjoint(r.seeds for r in (*second, *other))


def test_sides_take_turns_in_an_order_that_is_drawn_anew() -> None:
    names = ["off", "auto", "depth1", "depth3"]
    orders = [drawn_order(names, seed=0, repetition=repetition) for repetition in range(30)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert {order[0] for order in orders} == set(names)
    assert drawn_order(names, 0, 7) == orders[7]
    knowing = [drawn_order([*names, "perfect"], 0, repetition) for repetition in range(30)]
    assert {order.index("perfect") for order in knowing} == {4}
    assert {order[0] for order in knowing} == set(names)


def test_the_side_that_knows_what_is_said_drafts_nothing_else(options: BenchOptions) -> None:
    cores = started_cores(side_configs(options, str(options.model), ()))
    times = repeat(FOUR, cores, PROMPTS, seed=0, num_repetitions=1)
    perfect, plain = times["perfect"][0].result, times["off"][0].result
    assert perfect.replies == plain.replies
    counters = [sample.spec for sample in perfect.samples]
    num_drafted = sum(each.num_drafted for each in counters)
    assert num_drafted > 0
    assert sum(each.num_correct for each in counters) == num_drafted
    told = knowing(requests(FOUR, PROMPTS, 0, 1), plain)
    assert {reply.token_ids for wave in told for request in wave for reply in request.earlier} == {
        *plain.replies.values()
    }


def test_the_sides_are_off_automatic_and_fixed_depths_with_everything_else_as_shipped(options: BenchOptions) -> None:
    block = BenchOptions(model=options.model, draft=options.draft, rule="block")
    configs = side_configs(block, str(options.model), depths=(1, 3))
    assert list(configs) == ["off", "auto", "depth1", "depth3", "history", "perfect"]
    assert [name for name in side_configs(block, "x", depths=(1, 3, 7)) if "depth" in name] == [
        "depth1",
        "depth3",
        "depth7",
    ]
    sections = {name: config.speculative for name, config in configs.items()}
    assert [each.algorithm for each in sections.values()] == [
        *("NONE", "EAGLE3", "EAGLE3", "EAGLE3", "HISTORY", "HISTORY"),
    ]
    assert [name for name, each in sections.items() if each.is_automatic] == ["auto", "history", "perfect"]
    assert [name for name, each in sections.items() if each.use_block_verification] == ["auto", "depth1", "depth3"]
    depth3 = sections["depth3"]
    assert (depth3.num_steps, depth3.eagle_topk, depth3.num_draft_tokens) == (3, 1, 4)
    assert {config.engine.cost_probe_interval for config in configs.values()} == {EngineConfig.cost_probe_interval}
    cores = started_cores(configs)
    assert [name for name, core in cores.items() if core.speculation.controller is not None] == [
        *("auto", "history", "perfect"),
    ]
    assert len({id(core.decoder) for core in cores.values()}) == 1, "no side may be slower for where its weights lie"


def test_waves_come_one_after_another(options: BenchOptions) -> None:
    core = started_cores({"off": side_configs(options, str(options.model), ())["off"]})["off"]
    two = Scenario("1", 1, 1, fixed(5), num_waves=2)
    result = generate(core, requests(two, PROMPTS, 0, 1))
    assert [len(sample.token_ids) for sample in result.samples] == [5, 5]
    assert result.num_tokens == 10
    assert list(result.replies) == [("1.0", 0), ("1.1", 0)]
    assert result.samples[1].wait_s == pytest.approx(0.0, abs=result.samples[0].e2e_latency_s / 2)


def test_a_scenario_on_tiny_models_has_every_row_and_no_reply_that_differs(options: BenchOptions) -> None:
    rows = by_id(measure_scenario(options, FOUR, PROMPTS))
    assert rows["pays.untrained.4.same_replies"].value == 1.0
    assert "40 replies of auto, depth1, depth3, history, perfect" in rows["pays.untrained.4.same_replies"].what
    assert rows["pays.untrained.4.auto.speedup"].reach == ">= 1.3"
    assert [id for id, row in rows.items() if id.endswith(".speedup") and row.reach] == [
        "pays.untrained.4.auto.speedup"
    ]
    for name in ("off", "auto", "depth1", "depth3", "history", "perfect"):
        assert rows[f"pays.untrained.4.{name}.tokens_per_cpu_s"].value > 0.0
    for name in ("auto", "history"):
        assert 0.0 <= rows[f"pays.untrained.4.{name}.plain_steps"].value <= 1.0
        assert 0 <= rows[f"pays.untrained.4.{name}.pays_up_to"].value <= 64
        assert 0.2 < rows[f"pays.untrained.4.{name}.net_speedup_est"].value < 8.0


def test_with_races_every_side_draws_by_them_and_no_reply_differs(options: BenchOptions) -> None:
    rows = by_id(measure_scenario(replace(options, rule="gumbel", num_rounds=1), FOUR, PROMPTS))
    assert rows["pays.untrained.gumbel.4.same_replies"].value == 1.0
    assert "20 replies of auto, depth1, depth3, history, perfect" in rows["pays.untrained.gumbel.4.same_replies"].what


def by_id(rows: list[Row]) -> dict[str, Row]:
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: row for row in rows}


def result(
    cpu_s: float, reply: int = 0, benefit: NetBenefit | None = None, num_off: int = 0, num_rounds: int = 0
) -> Timed[Result]:
    """A repetition of 10 tokens."""
    tokens = (reply, *range(9))
    counters = SpecCounters(num_rounds=num_rounds, num_off_steps=num_off)
    sample = GeneratedSample("g", 0, tokens, (-1.0,) * 10, "length", 0, 4, spec=counters)
    return Timed(99.0, Result((sample,), benefit or NetBenefit(1.0, 1.0)), cpu_s)


MADE_UP = {
    "off": [result(10.0), result(12.0), result(20.0)],
    "auto": [
        result(5.0, benefit=NetBenefit(4.0, 8.0), num_off=1, num_rounds=2),
        result(6.0, benefit=NetBenefit(5.0, 12.5), num_off=1, num_rounds=4),
        result(25.0, benefit=NetBenefit(20.0, 15.0), num_off=3, num_rounds=1),
    ],
    "depth1": [result(5.0), result(8.0), result(10.0)],
    "depth3": [result(11.0), result(11.0), result(11.0)],
    "history": [result(10.0), result(10.0), result(10.0, reply=1)],
    "perfect": [result(2.0), result(3.0), result(4.0)],
}
BATCHES = {"auto": 4, "history": None}


def test_rows_are_ratios_of_tokens_per_cpu_second_repetition_by_repetition() -> None:
    rows = by_id(rows_of(Where("untrained", "4"), MADE_UP, BATCHES, bound=1.3))
    prefix = "pays.untrained.4"
    speedup = rows[f"{prefix}.auto.speedup"]
    assert (speedup.value, speedup.reach, speedup.holds) == (pytest.approx(2.0), ">= 1.3", True)
    assert speedup.what.endswith("each 2.000, 2.000, 0.800")
    least = rows[f"{prefix}.auto.least"]
    assert (least.value, least.reach, least.holds) == (pytest.approx(0.8), ">= 0.98", False)
    assert rows[f"{prefix}.depth3.speedup"].value == pytest.approx(12 / 11)
    assert rows[f"{prefix}.depth3.speedup"].holds is None
    perfect = rows[f"{prefix}.perfect.speedup"]
    assert (perfect.value, perfect.holds) == (pytest.approx(5.0), None)
    assert rows[f"{prefix}.history.least"].holds is True
    assert rows[f"{prefix}.off.tokens_per_cpu_s"].value == pytest.approx(10 / 12)


def test_the_automatic_depth_is_held_to_the_best_of_off_and_fixed_depths() -> None:
    best = by_id(rows_of(Where("untrained", "4"), MADE_UP, BATCHES, None))["pays.untrained.4.auto.over_best_fixed"]
    assert "the best fixed setting, EAGLE-3, depth 1," in best.what
    assert best.what.endswith("each 1.000, 1.333, 0.400")
    assert (best.value, best.holds) == (pytest.approx(1.0), True)


def test_the_engines_estimate_is_compared_with_the_prefill_put_in() -> None:
    rows = by_id(rows_of(Where("untrained", "4"), MADE_UP, BATCHES, None))
    estimate = rows["pays.untrained.4.auto.net_speedup_est"]
    assert estimate.value == pytest.approx(2.0)
    assert estimate.what.endswith("each 2.000, 2.500, 0.750")
    # (5 - 4 + 8) / 5, (6 - 5 + 12.5) / 6, (25 - 20 + 15) / 25, over 2, 2 and 0.8
    assert rows["pays.untrained.4.auto.net_speedup_est.over_measured"].value == pytest.approx(1.0)
    assert "(1.800, 2.250, 0.800)" in rows["pays.untrained.4.auto.net_speedup_est.over_measured"].what
    assert rows["pays.untrained.4.auto.plain_steps"].value == pytest.approx(5 / 12)
    assert rows["pays.untrained.4.auto.pays_up_to"].value == 4.0
    assert "pays.untrained.4.history.pays_up_to" not in rows


def test_a_reply_that_speculation_changed_is_found_except_where_the_rule_changes_replies() -> None:
    changed = {**MADE_UP, "depth1": [result(5.0), result(8.0, reply=2), result(10.0)]}
    same = by_id(rows_of(Where("untrained", "4"), changed, BATCHES, None))["pays.untrained.4.same_replies"]
    assert (same.value, same.holds) == (pytest.approx(13 / 15), False)
    block = by_id(rows_of(Where("trained", "4", "block"), changed, BATCHES, None))
    same = block["pays.trained.block.4.same_replies"]
    assert (same.value, same.holds) == (pytest.approx(5 / 6), False)
    assert same.what.endswith("6 replies of history, perfect")


def test_the_command_measures_a_trained_policy_by_the_bounds_of_one(options: BenchOptions, tmp_path: Path) -> None:
    flags = ["--policy", str(options.model), "--draft", options.draft, "--rule", "rejection", "--new-tokens", "6"]
    files = ["--json", str(tmp_path / "rows.json")]
    code = main(["bench", "pays", "--only", "4", "8", "--rounds", "1", *flags, *files])
    rows = {row["id"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert code == int(any(row["holds"] is False for row in rows.values()))
    assert rows["pays.trained.rejection.4.auto.speedup"]["reach"] == ">= 1.7"
    assert rows["pays.trained.rejection.8.auto.speedup"]["reach"] == ">= 1.05"


@pytest.mark.parametrize(
    ("argv", "setting"),
    [
        (["--policy", "/nowhere"], "model.hf_checkpoint"),
        (["--only", "46"], "--only"),
        (["--rule", "lenient"], "slime-spec bench pays"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_measured(argv: list[str], setting: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run_bench("pays", argv)
    assert refused.value.setting == setting


def test_the_long_tail_job_is_measured_with_its_own_prompts() -> None:
    scenario = scenarios(LONGEST_IN_JOB)["longtail"]
    job = composed(["--config", "smollm2-135m-longtail"]).config
    assert (scenario.suite,) == job.task.names
    assert (scenario.num_groups, scenario.num_samples) == (job.rollout.batch_size, job.rollout.n_samples_per_prompt)
    assert scenario.length(random.Random(0)) == job.rollout.max_response_len
    assert scenario.ends_itself
