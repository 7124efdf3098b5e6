"""Measure what the trainer saves by leaving out groups whose advantages are zero, and that weights do not notice.

The policy's own replies to prompts of the main job are one rollout. Which groups have equal rewards is chosen, not
found: so many that they hold the share of response tokens which they held over a whole run of the main job, and half.
The same rank makes steps with and without passes over them in turn, and a step on nothing but flat samples, which is
what a step costs apart from its passes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, combinations
from pathlib import Path

import torch

from slime_spec.bench.local_engine import engine_config, started_engine
from slime_spec.bench.lone_rank import lone_rank
from slime_spec.bench.prompts import in_domain
from slime_spec.bench.rows import BenchOptions, Row, at_least, at_most
from slime_spec.bench.timing import Timed, interleaved
from slime_spec.config.tree import Config
from slime_spec.launch.compose import compose
from slime_spec.rl.estimators import group_advantages
from slime_spec.rl.requests import sample_seed, sampling_params
from slime_spec.types import GroupRequest, TrainReport, TrainSample
from trainer_bridge.flat_samples import split_batch
from trainer_bridge.megatron.model import hf_tensors
from trainer_bridge.megatron.rank import TrainerRank

FLAT_SHARES = (0.43, 0.5)  # of response tokens; the first is that of a whole run of the main job
# Of the saving of a step whose cost is in proportion to the tokens that it trains on. AdamW's, which is not, is 3 %.
LEAST_OF_PROPORTIONAL = 0.95
SAME_WEIGHTS = 1e-6
Groups = Sequence[Sequence[TrainSample]]
Times = Sequence[Timed[TrainReport]]


@dataclass(frozen=True)
class StepTimes:
    """Holds times of steps: passes over all samples, none over each share's flat ones, metrics asked for, no passes."""

    whole: Times
    left_out: tuple[Times, ...]
    asked: Times
    nothing: Times


@dataclass(frozen=True)
class Compared:
    """Holds how far apart weights are after the same steps with and without passes over flat samples."""

    num_steps: int
    largest_difference: float
    largest_move: float


def measure(options: BenchOptions) -> list[Row]:
    config = one_thread(compose(["--config", "smollm2-135m", "--hf-checkpoint", str(options.model)]))
    groups = rollout(config, options.seeds[0])
    steps = step_times(config, groups, FLAT_SHARES, options.num_rounds)
    return [*saving_rows(steps), *weight_rows(compared_weights(config, groups[:4]))]


def one_thread(config: Config) -> Config:
    """Return the configuration with one compute thread: CPU time is then not that of waiting threads."""
    return replace(config, trainer=replace(config.trainer, num_cpus_per_rank=1))


def rollout(config: Config, seed: int) -> list[list[TrainSample]]:
    """Generate one rollout of the main job's shape, a list of samples per prompt, with advantages still to be given."""
    asked, model = config.rollout, Path(config.model.hf_checkpoint)
    params = sampling_params(asked)
    groups = []
    with started_engine(engine_config(model, config.engine.dtype)) as engine:
        for index, prompt in enumerate(in_domain(model, asked.batch_size, seed)):
            seeds = tuple(sample_seed(seed, index, i) for i in range(asked.n_samples_per_prompt))
            samples = engine.generate(GroupRequest(str(index), prompt, seeds, params))
            groups.append([TrainSample(prompt + s.token_ids, len(prompt), s.logprobs, 0.0) for s in samples])
    return groups


def with_flat_share(groups: Groups, share: float) -> list[list[TrainSample]]:
    """Give every other sample of a group reward 1, except in the groups whose tokens together are nearest ``share``.

    Those are flat, and come last.
    """
    counts = [sum(len(sample.rollout_logprobs) for sample in group) for group in groups]
    numbers = range(len(groups))
    choices = chain.from_iterable(combinations(numbers, k) for k in numbers)
    flat = min(choices, key=lambda chosen: abs(sum(counts[i] for i in chosen) / sum(counts) - share))
    ordered = [i for i in numbers if i not in flat] + list(flat)
    return [_rewarded(groups[i], [0.0 if i in flat else float(j % 2) for j in range(len(groups[i]))]) for i in ordered]


def _rewarded(group: Sequence[TrainSample], rewards: Sequence[float]) -> list[TrainSample]:
    advantages = group_advantages(rewards, normalize_std=True)
    return [replace(sample, advantage=advantage) for sample, advantage in zip(group, advantages, strict=True)]


def step_times(config: Config, groups: Groups, shares: Sequence[float], num_rounds: int) -> StepTimes:
    """Time steps of one rank on the same samples, in turn; metrics of all samples at the first share."""
    by_share = [list(chain(*with_flat_share(groups, share))) for share in shares]
    nothing = [replace(sample, advantage=0.0) for sample in by_share[0]]
    with lone_rank(config) as rank:

        def step(turn: int, samples: Sequence[TrainSample], leave_out: bool = True, ask: bool = False) -> TrainReport:
            rank.leaves_out_flat = leave_out
            rank.config = replace(config, trainer=replace(config.trainer, metrics_of_all_samples=ask))
            return rank.step(samples)

        sides: Mapping[str, Callable[[int], TrainReport]] = {
            "all": partial(step, samples=by_share[0], leave_out=False),
            **{str(i): partial(step, samples=samples) for i, samples in enumerate(by_share)},
            "asked": partial(step, samples=by_share[0], ask=True),
            "nothing": partial(step, samples=nothing),
        }
        times = interleaved("steps of the trainer", num_rounds, sides)
    left_out = tuple(times[str(i)] for i in range(len(shares)))
    return StepTimes(times["all"], left_out, times["asked"], times["nothing"])


def saving_rows(steps: StepTimes) -> list[Row]:
    """Compare CPU times of whole steps, and of their passes: a step less one that has no passes."""
    num_tokens = steps.whole[0].result.num_tokens
    rows = [
        _cpu_row("all", f"a step of {num_tokens} response tokens, passes over all", steps.whole),
        _cpu_row("nothing", "the same, all samples flat: AdamW and what else a step does", steps.nothing),
    ]
    for times in steps.left_out:
        share = 1.0 - times[0].result.num_trained_tokens / num_tokens
        name, words = f"flat{share:.0%}".removesuffix("%"), f"{share:.1%} of the tokens in flat groups"
        least = LEAST_OF_PROPORTIONAL / (1.0 - share)
        passes = [
            (whole.cpu_s - fixed.cpu_s) / (left.cpu_s - fixed.cpu_s)
            for whole, left, fixed in zip(steps.whole, times, steps.nothing, strict=True)
        ]
        rows += [
            _cpu_row(name, f"{words}, no passes over those", times),
            _saving_row(
                name, f"{words}: CPU time of passes over all, over without", _ratios(steps.whole, times), least
            ),
            _saving_row(f"{name}.passes", f"{words}: the same of the passes alone", passes),
        ]
    words = "a forward pass over flat samples, for metrics"
    return [
        *rows,
        _cpu_row("asked", f"the first share, and {words}", steps.asked),
        _saving_row("asked", f"CPU time of passes over all, over {words}", _ratios(steps.whole, steps.asked)),
    ]


def _ratios(whole: Times, less: Times) -> list[float]:
    return [a.cpu_s / b.cpu_s for a, b in zip(whole, less, strict=True)]


def _cpu_row(name: str, what: str, times: Times) -> Row:
    text = f"{what}; each repetition {', '.join(f'{time.cpu_s:.2f}' for time in times)}"
    return Row(f"flat_groups.{name}.cpu", text, statistics.median(time.cpu_s for time in times), "CPU s")


def _saving_row(name: str, what: str, ratios: Sequence[float], bound: float | None = None) -> Row:
    text = f"{what}; each repetition {', '.join(f'{ratio:.3f}' for ratio in ratios)}"
    id, median = f"flat_groups.{name}.saving", statistics.median(ratios)
    return Row(id, text, median, "x") if bound is None else at_least(id, text, median, "x", bound)


def compared_weights(config: Config, groups: Groups) -> Compared:
    """Make the same steps twice from the checkpoint: on mixed groups with flat ones, on flat ones alone, on the first.

    Half of ``groups`` are made flat, so that each kind is there.
    """
    half = len(groups) // 2
    mixed = [_rewarded(group, [float(j % 2) for j in range(len(group))]) for group in groups[:half]]
    flat = [_rewarded(group, [0.0] * len(group)) for group in groups[half:]]
    some, none = list(chain(*mixed, *flat)), list(chain(*flat))
    batches = [some, none, some]
    assert split_batch(none, leave_out_flat=True).trained == ()
    with lone_rank(config) as rank:
        before = _weights(rank)
        after = _after(rank, batches, leaves_out_flat=True)
    with lone_rank(config) as rank:
        slow = _after(rank, batches, leaves_out_flat=False)
    return Compared(
        num_steps=len(batches),
        largest_difference=max(float((after[name] - slow[name]).abs().max()) for name in slow),
        largest_move=max(float((before[name] - slow[name]).abs().max()) for name in slow),
    )


def _after(rank: TrainerRank, batches: Groups, leaves_out_flat: bool) -> dict[str, torch.Tensor]:
    rank.leaves_out_flat = leaves_out_flat
    for batch in batches:
        rank.step(batch)
    return _weights(rank)


def _weights(rank: TrainerRank) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in hf_tensors(rank.model, rank.spec)}


def weight_rows(compared: Compared) -> list[Row]:
    what = f"after {compared.num_steps} steps, one of them on flat samples alone"
    return [
        Row("flat_groups.weights_moved", f"largest change of a weight {what}", compared.largest_move, "weight"),
        at_most(
            "flat_groups.weight_diff",
            f"largest |weight - weight by passes over all samples| {what}",
            compared.largest_difference,
            "weight",
            SAME_WEIGHTS,
        ),
    ]
