"""Measure what a whole step of the main job costs, in float32 and in bfloat16, with and without flat groups.

A step is a rollout at full batch, the policy update, and the push of its weights to the engine; trainer and engine are
parts of this process, so that its CPU time is that of all three. The learning rate is 0: a repetition finds the policy
that the one before it found, and updates cost what they always cost. All sides train on the same samples.

    plain   float32, passes over all groups              what a step costs where nothing is saved
    job     float32, flat groups left out                the main job
    bf16    bfloat16, flat groups left out               the same job with --config smollm2-135m-bf16

How far the trainer's logprobs are from the engine's is measured on each dtype's own samples, at all tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count

from rollout.embedded.engine import EmbeddedEngine
from slime_spec.bench.flat_groups import Groups, one_thread, with_flat_share
from slime_spec.bench.lone_rank import beside, lone_rank
from slime_spec.bench.prompts import Prompts, in_domain
from slime_spec.bench.rows import BenchOptions, Row, at_least
from slime_spec.bench.timing import Timed, interleaved, timed
from slime_spec.config.tree import Config
from slime_spec.launch.compose import compose
from slime_spec.rl.requests import sample_seed, sampling_params
from slime_spec.transports.in_process import InProcessTransport
from slime_spec.types import GroupRequest, TrainReport, TrainSample
from slime_spec.weights.run import push_messages, run_push
from trainer_bridge.megatron.model import hf_tensors
from trainer_bridge.megatron.rank import TrainerRank

FLAT_SHARE = 0.43  # of response tokens, over a whole run of the main job
LEAST_SAVING = 1.5
CONFIGS = {"float32": "smollm2-135m", "bfloat16": "smollm2-135m-bf16"}
Samples = Sequence[TrainSample]


@dataclass(frozen=True)
class Step:
    """Holds the CPU seconds of one step's phases (rollout, train, push), and what its trainer reports."""

    cpu_s: Mapping[str, float]
    report: TrainReport

    @property
    def whole_s(self) -> float:
        return sum(self.cpu_s.values())


@dataclass(frozen=True)
class Compared:
    """Holds the steps of each side, repetition by repetition, and a report of each dtype on its own samples."""

    steps: Mapping[str, Sequence[Step]]
    own: Mapping[str, TrainReport]


class Job:
    """Runs steps of one dtype's job: an engine and a trainer's rank in this process."""

    def __init__(self, config: Config, rank: TrainerRank, engine: EmbeddedEngine, prompts: Prompts, seed: int) -> None:
        self.config, self._rank, self._engine = config, rank, engine
        self._prompts, self._seed, self._versions = prompts, seed, count(1)

    def rollout(self) -> list[list[TrainSample]]:
        """Generate all groups at once; advantages are still to be given."""
        asked = self.config.rollout
        params = sampling_params(asked)
        seeds = [
            tuple(sample_seed(self._seed, index, i) for i in range(asked.n_samples_per_prompt))
            for index in range(len(self._prompts))
        ]
        generations = [
            self._engine.generate(GroupRequest(str(index), prompt, seeds[index], params))
            for index, prompt in enumerate(self._prompts)
        ]
        return [
            [TrainSample(prompt + each.token_ids, len(prompt), each.logprobs, 0.0) for each in generation]
            for prompt, generation in zip(self._prompts, generations, strict=True)
        ]

    def train(self, samples: Samples, leaves_out_flat: bool = True) -> TrainReport:
        """Make the policy update while the engine has given its memory away."""
        self._rank.leaves_out_flat = leaves_out_flat
        self._engine.set_resident(False)
        report = self._rank.step(samples)
        self._engine.set_resident(True)
        return report

    def push(self) -> None:
        """Bring the engine to the trainer's weights; the bytes are not copied on their way, as between processes."""
        weights = {name: tensor.detach() for name, tensor in hf_tensors(self._rank.model, self._rank.spec)}
        bucket_bytes, verify = self.config.push.bucket_bytes, self.config.push.verify
        messages = push_messages(weights, next(self._versions), "target", bucket_bytes, InProcessTransport())
        run_push(messages, lambda message: [self._engine.update_weights(message)], verify)

    def step(self, samples: Samples, leaves_out_flat: bool = True) -> Step:
        """Run a whole step, trained on these samples instead of the rollout's."""
        rollout = timed(self.rollout)
        train = timed(partial(self.train, samples, leaves_out_flat))
        push = timed(self.push)
        return Step({"rollout": rollout.cpu_s, "train": train.cpu_s, "push": push.cpu_s}, train.result)


def measure(options: BenchOptions) -> list[Row]:
    configs = [compose(["--config", name, "--hf-checkpoint", str(options.model)]) for name in CONFIGS.values()]
    prompts = in_domain(options.model, configs[0].rollout.batch_size, options.seeds[0])
    with jobs([frozen(each) for each in configs], prompts, options.seeds[0]) as started:
        return rows_of(compared(started, FLAT_SHARE, options.num_rounds))


def frozen(config: Config) -> Config:
    """Return the configuration with one compute thread and a learning rate of 0."""
    config = one_thread(config)
    return replace(config, trainer=replace(config.trainer, lr=0.0))


@contextmanager
def jobs(configs: Sequence[Config], prompts: Prompts, seed: int) -> Iterator[dict[str, Job]]:
    """Start every configuration's engine and trainer, by the trainer's dtype; the trainers share process groups."""
    with lone_rank(configs[0]) as first:
        ranks = [first, *(beside(first, config) for config in configs[1:])]
        engines = [EmbeddedEngine(config, 0, InProcessTransport()) for config in configs]
        try:
            for engine in engines:
                engine.start()
            yield {
                config.trainer.dtype: Job(config, rank, engine, prompts, seed)
                for config, rank, engine in zip(configs, ranks, engines, strict=True)
            }
        finally:
            for engine in engines:
                engine.stop()


def compared(started: Mapping[str, Job], flat_share: float, num_rounds: int) -> Compared:
    """Take whole steps of all sides in turn, on the samples of the first dtype."""
    own = {dtype: with_flat_share(job.rollout(), flat_share) for dtype, job in started.items()}
    samples = _flattened(own["float32"])
    sides: Mapping[str, Callable[[int], Step]] = {
        "plain": lambda turn: started["float32"].step(samples, leaves_out_flat=False),
        "job": lambda turn: started["float32"].step(samples),
        "bf16": lambda turn: started["bfloat16"].step(samples),
    }
    times: Mapping[str, Sequence[Timed[Step]]] = interleaved("whole steps", num_rounds, sides)
    return Compared(
        steps={side: [each.result for each in steps] for side, steps in times.items()},
        own={dtype: job.train(_flattened(own[dtype]), leaves_out_flat=False) for dtype, job in started.items()},
    )


def _flattened(groups: Groups) -> list[TrainSample]:
    return list(chain(*groups))


def rows_of(compared: Compared) -> list[Row]:
    report = compared.steps["job"][0].report
    share = 1.0 - report.num_trained_tokens / report.num_tokens
    words = {
        "plain": f"float32, passes over all {report.num_tokens} response tokens",
        "job": f"float32, {share:.1%} of the tokens in flat groups, no passes over those",
        "bf16": "the same in bfloat16, trainer and engine",
    }
    rows = []
    for side, steps in compared.steps.items():
        for phase in steps[0].cpu_s:
            rows.append(_cpu_row(f"{side}.{phase}", f"{words[side]}: {phase}", [each.cpu_s[phase] for each in steps]))
        rows.append(_cpu_row(side, f"{words[side]}: the whole step", [each.whole_s for each in steps]))
    for name, more, less, least in (
        ("job", "plain", "job", None),
        ("bf16_alone", "job", "bf16", None),
        ("bf16", "plain", "bf16", LEAST_SAVING),
    ):
        rows += _saving_rows(name, f"{more} over {less}", compared.steps[more], compared.steps[less], least)
    for dtype, own in compared.own.items():
        difference = own.train_rollout_logprob_abs_diff
        assert difference is not None, "every token had a pass"
        rows += [
            Row(f"step.{dtype}.logprob_abs_diff", "trainer and engine, all tokens", difference, "nats/token"),
            Row(f"step.{dtype}.grad_norm", "of its own samples", own.grad_norm, "norm"),
        ]
    return rows


def _cpu_row(name: str, what: str, seconds: Sequence[float]) -> Row:
    text = f"{what}; each repetition {', '.join(f'{each:.2f}' for each in seconds)}"
    return Row(f"step.{name}.cpu", text, statistics.median(seconds), "CPU s")


def _saving_rows(name: str, sides: str, more: Sequence[Step], less: Sequence[Step], least: float | None) -> list[Row]:
    """Compare the steps' training and the steps as a whole, pair by pair."""
    pairs = list(zip(more, less, strict=True))
    train = [a.cpu_s["train"] / b.cpu_s["train"] for a, b in pairs]
    whole = [a.whole_s / b.whole_s for a, b in pairs]
    return [
        _saving_row(f"{name}.train", f"CPU time of training, {sides}", train, None),
        _saving_row(name, f"CPU time of the whole step, {sides}", whole, least),
    ]


def _saving_row(name: str, what: str, ratios: Sequence[float], least: float | None) -> Row:
    text = f"{what}; each repetition {', '.join(f'{each:.3f}' for each in ratios)}"
    id, median = f"step.{name}.saving", statistics.median(ratios)
    return Row(id, text, median, "x") if least is None else at_least(id, text, median, "x", least)
