"""The engine and speculation parts on tiny models: that they measure what they say, whatever the times are."""

import math
from pathlib import Path
from time import perf_counter

import pytest
import torch

from rollout.embedded.assemble import Assembly
from slime_spec.bench.engine import engine_logits, measure_engine
from slime_spec.bench.hf_generate import HfGenerate
from slime_spec.bench.local_engine import engine_config, greedy, started_engine
from slime_spec.bench.plain import PlainSizes
from slime_spec.bench.prompts import COPY, KINDS, ORDINARY, in_domain
from slime_spec.bench.rows import Row
from slime_spec.bench.speculation import SpeculationSizes, break_even_length, measure_speculation
from slime_spec.bench.timing import Timed, interleaved, median_ratio, median_s
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.draft.training.sequence import DraftSequence, split
from slime_spec.types import GeneratedSample, SpecCounters
from tests.support.embedded_harness import random_prompt
from tests.support.tiny_models import make_tiny_checkpoint
from tests.support.tiny_policy import make_tiny_policy


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama")


def test_in_domain_prompts_are_of_both_kinds_and_none_that_a_draft_is_trained_on(tmp_path: Path) -> None:
    policy = make_tiny_policy(tmp_path)
    prompts = in_domain(policy, 40, seed=0)
    assert len(prompts) == 40
    trained_on, judged_by = split([DraftSequence(i, (*ids, 1, 2), len(ids), "") for i, ids in enumerate(prompts)], 5)
    assert (len(trained_on), len(judged_by)) == (0, 40)
    assert {Tokenizer.load(policy).decode(ids).split()[0] for ids in prompts} == {"What", "Which"}
    assert len(set(prompts)) > 20


def by_id(rows: list[Row]) -> dict[str, Row]:
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: row for row in rows}


def test_the_engine_part_compares_speed_logits_and_greedy_tokens(tiny: Path) -> None:
    prompts = tuple(random_prompt(5 + 3 * i, seed=i) for i in range(4))
    sizes = PlainSizes(num_new_tokens=8, num_rounds=2, batch_sizes=(1, 3))
    rows = by_id(measure_engine(tiny, prompts, sizes))
    figures = ("tokens_per_s", "hf_tokens_per_s", "ratio")
    speeds = {f"engine.{dtype}.b{size}.{figure}" for dtype in ("fp32", "bf16") for size in (1, 3) for figure in figures}
    assert rows.keys() == speeds | {"engine.fp32.logit_diff_max", "engine.fp32.greedy_identical"}
    assert all(math.isfinite(rows[name].value) and rows[name].value > 0 for name in speeds)
    assert rows["engine.fp32.logit_diff_max"].holds
    assert rows["engine.fp32.logit_diff_max"].value > 0
    assert rows["engine.fp32.greedy_identical"].holds
    assert "of 8 timed" in rows["engine.fp32.greedy_identical"].what


def test_both_sides_go_on_after_an_eos(tiny: Path, tmp_path: Path) -> None:
    prompt = random_prompt(9, seed=1)
    (reply,) = HfGenerate(tiny, "float32", 12).replies([prompt])
    stopping = make_tiny_checkpoint(tmp_path / "stopping", eos_token_id=reply[4])
    assert HfGenerate(stopping, "float32", 12).replies([prompt]) == [reply]
    with started_engine(engine_config(stopping, "float32")) as engine:
        (sample,) = greedy(engine, [prompt], 12, speculative=False)
    assert sample.token_ids == reply


def test_logits_of_another_model_are_told_apart(tiny: Path, tmp_path: Path) -> None:
    prompt, reply = random_prompt(12, seed=2), random_prompt(5, seed=3)
    core = Assembly(engine_config(tiny, "float32")).core(0, perf_counter)
    ours = engine_logits(core, prompt, reply)
    same = HfGenerate(tiny, "float32", 1).logits(prompt + reply)
    assert (ours - same).abs().max() < 2e-4
    other_rope = make_tiny_checkpoint(
        tmp_path / "other", rope_parameters={"rope_type": "default", "rope_theta": 10100.0}
    )
    other = HfGenerate(other_rope, "float32", 1).logits(prompt + reply)
    assert (ours - other).abs().max() > 2e-4


def test_the_speculation_part_measures_both_kinds_at_every_batch_size(tiny: Path) -> None:
    pattern = random_prompt(6, seed=4)
    prompts = {"copy": (pattern * 4, pattern * 5), "ordinary": (random_prompt(20, 5), random_prompt(17, 6))}
    rows = by_id(measure_speculation(tiny, prompts, SpeculationSizes(12, 2, (1, 2))))
    assert len(rows) == 2 * 2 * 7
    for kind in prompts:
        for size in (1, 2):
            prefix = f"speculation.{kind}.b{size}"
            assert rows[f"{prefix}.greedy_identical"].holds
            assert rows[f"{prefix}.ratio"].value > 0
            assert rows[f"{prefix}.ratio"].holds is None
            assert rows[f"{prefix}.accept_length"].value >= 12 / 11
            assert math.isfinite(rows[f"{prefix}.break_even_length"].value)


def timed_samples(seconds: float, *lengths_and_rounds: tuple[int, int]) -> Timed[list[GeneratedSample]]:
    return Timed(
        seconds,
        [
            GeneratedSample("g", 0, (1,) * length, (0.0,) * length, "length", 0, 3, SpecCounters(rounds, 4 * rounds))
            for length, rounds in lengths_and_rounds
        ],
    )


def test_the_break_even_length_is_a_rounds_time_over_a_steps_time() -> None:
    # 1 s of prefill; on: 12 rounds in 6 s, 0.5 s each; off: 40 steps in 10 s, 0.25 s each.
    on = timed_samples(7.0, (21, 5), (21, 7))
    off = timed_samples(11.0, (21, 0), (21, 0))
    prefill = timed_samples(1.0, (1, 0), (1, 0))
    assert break_even_length([on], [off], [prefill]) == pytest.approx(2.0)
    slow = timed_samples(100.0, (21, 5), (21, 7))
    assert break_even_length([on, slow, on], [off] * 3, [prefill] * 3) == pytest.approx(2.0)


def test_sides_take_turns_and_the_first_round_does_not_count() -> None:
    now = iter(range(100))
    calls: list[tuple[str, int]] = []

    def side(name: str):
        def call(turn: int) -> str:
            calls.append((name, turn))
            return f"{name}{turn}"

        return call

    times = interleaved("test", 3, {"a": side("a"), "b": side("b")}, clock=lambda: float(next(now)))
    assert calls == [("b", 0), ("a", 0), ("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert [each.result for each in times["a"]] == ["a0", "a1", "a2"]
    assert [each.seconds for each in times["b"]] == [1.0, 1.0, 1.0]


def test_ratios_are_medians_of_rounds_not_ratios_of_medians() -> None:
    a = [Timed(seconds, None) for seconds in (1.0, 20.0, 30.0)]
    b = [Timed(seconds, None) for seconds in (1.0, 10.0, 10.0)]
    assert median_s(a) == 20.0
    assert median_ratio(a, b) == 2.0


def test_copy_prompts_contain_what_their_reply_repeats() -> None:
    assert KINDS == {"copy": COPY, "ordinary": ORDINARY}
    assert len(set(COPY)) == len(set(ORDINARY)) == 8
    assert all(len(text.partition("\n\n")[2]) > 100 for text in COPY)


def test_hugging_face_pads_so_that_a_batch_gives_what_single_prompts_give(tiny: Path) -> None:
    prompts = [random_prompt(length, seed=length) for length in (4, 11, 7)]
    reference = HfGenerate(tiny, "float32", 6)
    assert reference.replies(prompts) == [reference.replies([prompt])[0] for prompt in prompts]
    assert torch.equal(reference.logits(prompts[0]), reference.logits(prompts[0]))
