"""The parts of ``bench engine`` that speculate, on tiny models: what they ask, compare and report."""

import json
import math
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest
import torch

from rollout.embedded.assemble import Assembly
from slime_spec.bench import run_bench
from slime_spec.bench.advice import LookupSizes, measure_advice, measure_lookup
from slime_spec.bench.cost import CostSizes, measure_cost, time_passes
from slime_spec.bench.device.random_model import SHAPES as MODEL_SHAPES
from slime_spec.bench.device.random_model import shape_config
from slime_spec.bench.draft_cost import DraftSizes, measure_draft
from slime_spec.bench.draft_temperature import TemperatureSizes, first_accepted, measure_temperatures
from slime_spec.bench.drafts import Shape, eagle3_config, vllm_draft_folder
from slime_spec.bench.eagle3 import Eagle3Sizes, best_rows, measure_eagle3
from slime_spec.bench.exactness import ExactnessSizes, divergence_margins, logit_noise, measure_exactness, speculating
from slime_spec.bench.local_engine import engine_config, greedy, started_engine
from slime_spec.bench.memory_probe import held_memory
from slime_spec.bench.plain import PlainSizes, measure_plain
from slime_spec.bench.race import Answer, Ask, EngineSide, ForgetfulSide, decode_speed_up, ratio_rows
from slime_spec.bench.random_engine import random_draft_spec
from slime_spec.bench.round_costs import measure_round_costs, timed_table
from slime_spec.bench.rows import BenchOptions, Row
from slime_spec.bench.timing import Budget, Timed
from slime_spec.checkpoints.draft_spec import DraftSpec, draft_config
from slime_spec.checkpoints.draft_tensors import draft_shapes
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import load_tensors
from slime_spec.errors import ConfigError
from slime_spec.speculation.draft_temperature import TEMPERATURES
from slime_spec.types import SpecCounters
from tests.support.embedded_harness import random_prompt
from tests.support.tiny_drafts import EAGLE3, make_tiny_draft
from tests.support.tiny_models import make_tiny_checkpoint

PROMPTS = tuple(random_prompt(6 + 2 * i, seed=i) for i in range(6))


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> BenchOptions:
    folder = tmp_path_factory.mktemp("speculating")
    target = make_tiny_checkpoint(folder / "target", eos_token_id=5)
    return BenchOptions(model=target, draft=str(make_tiny_draft(folder / "draft", target, EAGLE3)))


def by_id(rows: list[Row]) -> dict[str, Row]:
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: row for row in rows}


def answer(num_tokens: int, num_replies: int = 1) -> Answer:
    return Answer([tuple(range(num_tokens))] * num_replies, num_tokens)


def test_a_decode_ratio_leaves_the_prefill_out_on_both_sides() -> None:
    # 1 s of prefill each; then 20 tokens in 10 s against 10 tokens in 2 s.
    slow, fast, prefill = Timed(11.0, answer(21)), Timed(3.0, answer(11)), Timed(1.0, answer(1))
    assert decode_speed_up([slow], [fast], [prefill], "seconds") == pytest.approx(2.5)


def test_ratios_count_tokens_because_replies_end_where_they_end() -> None:
    slow, fast = Timed(10.0, answer(20), cpu_s=5.0), Timed(10.0, answer(40), cpu_s=2.5)
    rows = by_id(ratio_rows("x", "", [slow], [fast], 3.0))
    assert (rows["x.ratio"].value, rows["x.ratio"].holds) == (2.0, False)
    assert (rows["x.cpu_ratio"].value, rows["x.cpu_ratio"].holds) == (4.0, True)


@pytest.mark.parametrize(("batch_size", "reach"), [(1, ">= 2.5"), (8, ">= 2"), (64, ">= 1.4"), (4, "")])
def test_a_gpu_is_held_to_the_clock_with_the_prefill_and_without(batch_size: int, reach: str) -> None:
    times = {
        "plain": [Timed(11.0, answer(21), cpu_s=11.0)],
        "fast": [Timed(5.0, answer(21), cpu_s=5.0)],
        "prefill": [Timed(1.0, answer(1), cpu_s=1.0)],
    }
    rows = by_id(best_rows("x", "", times, "fast", batch_size, on_gpu=True))
    assert {id: row.value for id, row in rows.items()} == pytest.approx(
        {"x.decode_ratio": 2.5, "x.decode_cpu_ratio": 2.5, "x.ratio": 2.2, "x.cpu_ratio": 2.2}
    )
    assert (rows["x.decode_ratio"].reach, rows["x.ratio"].reach) == (reach, reach)
    assert (rows["x.decode_cpu_ratio"].reach, rows["x.cpu_ratio"].reach) == ("", "")


def test_every_engine_of_a_measurement_runs_on_the_same_device(options: BenchOptions) -> None:
    for num_gpus in (0, 1):
        on_device = replace(options, num_gpus=num_gpus)
        configs = [*speculating(on_device, "float32").values(), eagle3_config(on_device, "bfloat16", Shape(2, 1, 3))]
        assert {each.rollout.num_gpus_per_engine for each in configs} == {num_gpus}


def test_an_engine_answers_batch_by_batch_ends_at_eos_and_counts_its_passes(options: BenchOptions) -> None:
    with started_engine(eagle3_config(options, "float32", Shape(2, 1, 3))) as engine:
        exact = EngineSide(engine, speculative=False).answer(Ask(PROMPTS, 4, 9))
        speculated = EngineSide(engine, speculative=True).answer(Ask(PROMPTS, 2, 9))
        stop = exact.token_ids[0][3]
        ended = EngineSide(engine, speculative=True).answer(Ask(PROMPTS[:1], 1, 9, (stop,)))
    assert exact.num_passes == 6 * 8
    assert speculated.token_ids == exact.token_ids
    assert speculated.num_passes is not None
    assert speculated.num_passes <= exact.num_passes
    first = exact.token_ids[0]
    assert ended.token_ids == [first[: first.index(stop) + 1]]


def test_a_forgetful_engine_has_learned_nothing_from_the_round_before(options: BenchOptions) -> None:
    ask = Ask(PROMPTS[:1], 1, 24)
    with ForgetfulSide(engine_config(options.model, "float32", "NGRAM")) as side:
        side.renew()
        first, again = side.answer(ask), side.answer(ask)
        side.renew()
        renewed = side.answer(ask)
    assert first.num_passes is not None
    assert again.num_passes is not None
    assert first.token_ids == again.token_ids == renewed.token_ids
    assert again.num_passes < first.num_passes == renewed.num_passes


def test_the_plain_part_holds_both_dtypes_against_hugging_face(options: BenchOptions) -> None:
    rows = by_id(measure_plain(options.model, PROMPTS, PlainSizes(6, 1, (1, 3)), {1: 0.0, 3: 1e9}))
    assert len(rows) == 2 * 2 * 6
    for dtype in ("fp32", "bf16"):
        assert rows[f"plain.{dtype}.b1.ratio"].holds
        assert rows[f"plain.{dtype}.b3.cpu_ratio"].holds is False
        assert rows[f"plain.{dtype}.b1.hf.tokens_per_s"].value > 0


def test_the_eagle3_part_names_the_best_shape_and_compares_verifications(options: BenchOptions) -> None:
    shapes = (Shape(2, 1, 3), Shape(2, 2, 4))
    sizes = Eagle3Sizes(10, 1, (1, 4), (4,), ("float32",), ("float32",), shapes)
    rows = by_id(measure_eagle3(options, PROMPTS, sizes))
    for batch_size, reach in ((1, ">= 2"), (4, ">= 1.6")):
        best = rows[f"eagle3.fp32.b{batch_size}.best.decode_cpu_ratio"]
        assert best.reach == reach
        assert any(shape.name in best.what for shape in shapes)
        assert rows[f"eagle3.fp32.b{batch_size}.best.ratio"].holds is None
    for name in ("target_only", "rejection", "block"):
        assert rows[f"eagle3.fp32.b4.sampled.{name}.decode_cpu_ratio"].value > 0
        assert rows[f"eagle3.fp32.b4.sampled.{name}.tokens_per_cpu_s"].value > 0
    plain = "eagle3.fp32.b4.plain"
    assert rows[f"{plain}.decode_tokens_per_s"].value > 0
    assert rows[f"{plain}.decode_tokens_per_s"].value != rows[f"{plain}.tokens_per_s"].value


def test_the_draft_temperature_part_compares_a_drafts_own_distribution_with_a_chosen_one(options: BenchOptions) -> None:
    sizes = TemperatureSizes(1, 8, (1.0, 0.3), 4, Shape(2, 1, 3), "float32")
    rows = by_id(measure_temperatures(options, PROMPTS, sizes))
    for temperature in ("t1", "t0.3"):
        for side in ("target_only.likeliest", "gumbel.own", "rejection.own", "rejection.chosen", "block.chosen"):
            prefix = f"draft_temperature.{temperature}.{side}"
            assert 0.0 <= rows[f"{prefix}.first_accepted"].value <= 1.0
            assert 1.0 <= rows[f"{prefix}.tokens_a_round"].value <= 3.0
        assert rows[f"draft_temperature.{temperature}.gumbel.chosen.temperature"].value in TEMPERATURES
        assert rows[f"draft_temperature.{temperature}.block.gain"].value > 0
        assert f"draft_temperature.{temperature}.block.own.temperature" not in rows


def test_first_drafts_are_counted_over_the_rounds_that_drafted() -> None:
    spec = SpecCounters(num_rounds=10, num_proposed=30, histogram=(5, 3, 0, 2), num_drafted=24, num_empty_rounds=2)
    assert first_accepted(spec) == 5 / 8


def test_a_part_whose_seconds_are_over_says_what_it_left_out(options: BenchOptions) -> None:
    """Nothing is begun, no engine is started, and no figure is made up."""
    over = replace(options, seconds=0.0, dtypes=("float32",))
    sizes = Eagle3Sizes(10, 1, (1, 4), (4,), ("float32",), ("float32",), (Shape(2, 1, 3),))
    (row,) = measure_eagle3(over, PROMPTS, sizes)
    assert (row.id, row.value) == ("eagle3.left_out", 3.0)
    assert row.what.endswith("fp32 greedy batch 1, fp32 greedy batch 4, fp32 sampled batch 4")
    (row,) = measure_plain(options.model, PROMPTS, PlainSizes(6, 1, (1, 3), ("bfloat16",)), {}, seconds=0.0)
    assert (row.id, row.value) == ("plain.left_out", 2.0)
    (row,) = measure_exactness(over, PROMPTS, ExactnessSizes(16, 3, ("float32",)))
    assert (row.id, row.value) == ("exactness.left_out", 5.0)


def test_a_budget_lets_go_on_what_it_began() -> None:
    now = iter([0.0, 1.0, 9.0, 11.0]).__next__
    left_out: list[int] = []
    assert list(Budget(10.0, now).within([1, 2, 3], left_out)) == [1, 2]
    assert left_out == [3]
    assert list(Budget(None).within([1, 2, 3], left_out)) == [1, 2, 3]


def test_advice_is_measured_in_both_modes_and_without(options: BenchOptions) -> None:
    sizes = LookupSizes(12, 2, (1, 2), ("float32",))
    with started_engine(engine_config(options.model, "float32")) as engine:
        replies = [each.token_ids for each in greedy(engine, PROMPTS[:2], 24, speculative=False)]
    rows = by_id(measure_advice(options.model, dict(zip(PROMPTS, replies, strict=False)), sizes, longest=24))
    prefix = "lookup.fp32.edited_text.b1"
    assert rows[f"{prefix}.advice_n16.ratio"].reach == ">= 3"
    assert rows[f"{prefix}.edit_n16.ratio"].holds is None
    assert rows[f"{prefix}.edit_n8.tokens_per_pass"].value > 3  # the advice is the reply itself
    found = by_id(measure_lookup(options.model, {"copy": PROMPTS}, sizes))
    assert found["lookup.fp32.copy.b2.ngram.cpu_ratio"].value > 0


def test_passes_are_timed_for_every_batch_and_width_and_leave_the_cache_alone(options: BenchOptions) -> None:
    sizes = CostSizes(2, (1, 3), (1, 4), 16, ("float32",))
    passes = time_passes(options, "float32", sizes)
    assert passes.keys() == {"1,1", "1,4", "3,1", "3,4"}
    assert all(len(times) == 2 and min(each.seconds for each in times) > 0 for times in passes.values())


def test_draft_costs_are_those_of_rounds_and_leave_nothing_running(options: BenchOptions) -> None:
    sizes = DraftSizes(6, 1, (2, 8), (Shape(2, 1, 3), Shape(3, 1, 4)))
    found = measure_draft(options, "float32", PROMPTS, sizes)
    assert [(each.batch_size, each.num_tokens) for each in found.drafts] == [(2, 2), (8, 2), (2, 3), (8, 3)]
    assert all(each.seconds > 0 for each in found.drafts)
    assert found.accept_lengths.keys() == {2, 3}
    assert all(1.0 <= length <= steps + 1 for steps, length in found.accept_lengths.items())
    assert found.outside_shares.keys() == {
        f"{how}_{name}" for how in ("greedy", "sampled") for name in ("s2k1n3", "s3k1n4")
    }
    assert all(0 < share < 1 for share in found.outside_shares.values())


def test_the_cost_part_says_where_speculation_loses_and_draws_it(options: BenchOptions, tmp_path: Path) -> None:
    sizes = CostSizes(1, (1, 2), (1, 4), 16, ("float32",), DraftSizes(4, 1, (1, 8), (Shape(2, 1, 3),)))
    # A random draft of a random model gains next to nothing, so it loses at once.
    rows = by_id(measure_cost(replace(options, chart=tmp_path / "chart.svg"), PROMPTS, sizes))
    assert rows["cost.fp32.b1.verify4.ratio"].reach == "<= 1.2"
    assert rows["cost.fp32.model.s2.loses_from.measured"].value == 1
    predicted = rows["cost.fp32.model.s2.b1.predicted"].value
    length = rows["cost.fp32.model.s2.accept_length"].value
    assert predicted == pytest.approx(length / rows["cost.fp32.model.s2.b1.break_even"].value)
    assert rows["cost.fp32.memory_beside"].reach == "<= 300"
    assert (tmp_path / "chart.svg").read_text().startswith("<svg")


def test_an_engine_of_a_named_shape_has_costs_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no gains: its drafts are as random as its replies. No bound of the main job's model holds for it."""
    monkeypatch.chdir(tmp_path)  # where there is no models/
    report = tmp_path / "rows.json"
    argv = ["--only", "cost", "--model-shape", "tiny", "--rounds", "1", "--dtypes", "float32", "--batch-sizes", "1"]
    assert run_bench("engine", [*argv, "--shapes", "s2k1n3", "--json", str(report)]) == 0
    rows = {row["id"]: row for row in json.loads(report.read_text())["rows"]}
    assert all(id.startswith("cost.tiny.fp32.") for id in rows)
    assert all(row["holds"] is None for row in rows.values())
    measured = ("pass.b1.k1", "pass.b1.k8", "b1.verify4.ratio", "model.draft", "model.s2.b1.break_even")
    assert all(rows[f"cost.tiny.fp32.{name}"]["value"] > 0 for name in measured)
    assert not any("accept_length" in id or "predicted" in id or "loses_from.measured" in id for id in rows)


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_a_random_engine_is_one_of_the_shapes_config_with_a_draft_that_fits(name: str, tmp_path: Path) -> None:
    spec = MODEL_SHAPES[name]
    assert ModelSpec.from_dict(shape_config(spec, torch.bfloat16)) == spec
    draft = random_draft_spec(spec)
    assert DraftSpec.from_dict(draft_config(draft), spec) == draft
    if name == "8b":  # as SpecForge and EAGLE publish it: 0.85 GB in bf16
        count = sum(torch.Size(shape).numel() for shape in draft_shapes(draft).values())
        assert 2e-9 * count == pytest.approx(0.85, rel=0.01)


def test_memory_counts_weights_once_and_the_kv_bound(options: BenchOptions) -> None:
    held = held_memory(options.model, "float32", 512)
    spec = ModelSpec.from_folder(options.model)
    assert held.kv_bound == 512 * 2 * 4 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    assert held.weights == sum(each.nbytes for each in load_tensors(options.model, spec).values())
    assert held.process > held.weights + held.kv_bound


def test_greedy_replies_are_compared_and_margins_are_shown(options: BenchOptions) -> None:
    rows = by_id(measure_exactness(options, PROMPTS, ExactnessSizes(16, 3)))
    names = ("lookup", "ngram", "eagle3_s3k1n4", "eagle3_s5k4n8")
    for name in names:
        assert rows[f"exactness.fp32.{name}.greedy_identical"].holds
        assert rows[f"exactness.bf16.{name}.greedy_identical"].holds is None
    assert rows["exactness.bf16.margin_max"].holds
    assert math.isfinite(rows["exactness.bf16.logit_noise"].value)


def test_a_divergence_is_shown_with_the_margin_at_its_first_token(options: BenchOptions) -> None:
    core = Assembly(engine_config(options.model, "float32")).core(0, perf_counter)
    with started_engine(engine_config(options.model, "float32")) as engine:
        (sample,) = greedy(engine, PROMPTS[:1], 6, speculative=False)
    ours = sample.token_ids
    assert divergence_margins(core, PROMPTS[:1], [ours], [ours]) == []
    changed = (*ours[:3], (ours[3] + 1) % 131, *ours[4:])
    (margin,) = divergence_margins(core, PROMPTS[:1], [ours], [changed])
    (at_end,) = divergence_margins(core, PROMPTS[:1], [ours], [(*ours[:5], (ours[5] + 1) % 131)])
    assert margin > 0
    assert margin != at_end
    both = divergence_margins(core, PROMPTS[:1], [ours], [changed], [ours], [(*ours[:5], (ours[5] + 1) % 131)])
    assert both == pytest.approx([margin, at_end])
    assert logit_noise(core, PROMPTS[:1]) < 1e-4


def test_vllm_gets_the_draft_with_its_layers_named_by_their_inputs(options: BenchOptions, tmp_path: Path) -> None:
    folder = vllm_draft_folder(options, tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    original = Path(options.draft) / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == original.read_bytes()


@pytest.mark.parametrize(
    ("argv", "setting", "says"),
    [
        (["--only", "peer"], "--only", "Did you mean 'peers'?"),
        (["--threads", "0"], "--threads", "at least 1"),
        (["--chart", "/nowhere/chart.svg"], "--chart", "folder that is there"),
        (["--runs", "x"], "slime-spec bench engine", "--runs"),
        (["--model", "/nowhere"], "model.hf_checkpoint", "models fetch smollm2-135m"),
        (["--only", "eagle3", "--draft", "/nowhere"], "speculative.draft_model_path", "config.json"),
    ],
)
def test_a_mistake_is_refused_before_an_engine_starts(
    options: BenchOptions, argv: list[str], setting: str, says: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        run_bench("engine", ["--model", str(options.model), *argv])
    assert refused.value.setting == setting
    assert says in str(refused.value)


def test_round_costs_are_the_engines_own_by_batch_context_and_length(options: BenchOptions) -> None:
    rows = by_id(measure_round_costs(options, PROMPTS, ("float32",)))
    batches, lengths = (1, 2, 4, 8, 16, 32, 64), ("plain", "d1.break_even", "d3.break_even", "d7.break_even", "most")
    contexts = {id.split(".")[3] for id in rows}
    assert rows.keys() == {f"rounds.fp32.b{b}.{c}.{name}" for b in batches for c in contexts for name in lengths}
    context = min(contexts, key=lambda each: int(each[1:]))
    for batch in batches:
        prefix = f"rounds.fp32.b{batch}.{context}"
        assert rows[f"{prefix}.plain"].value > 0.0
        most = max((1 + depth) / rows[f"{prefix}.d{depth}.break_even"].value for depth in (1, 3, 7))
        assert rows[f"{prefix}.most"].value == pytest.approx(most)


def test_a_table_whose_drafting_was_fitted_says_so(options: BenchOptions) -> None:
    assert timed_table(options, PROMPTS, "float32").drafting == "measured"
