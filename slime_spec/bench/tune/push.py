"""One push goes from a real trainer to real engines, as in a run: what rollouts alone never try.

    trainer's rank ─ export ─ checksums ─► transport ─► engine: receive ─ checksum ─ swap ─ read back ─ compare

The weights are those the engines have already, so that replies and acceptance must be the same before and after: a
draft that was overwritten, or weights under the wrong name, show at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

from slime_spec.bench.tune.candidates import Candidate, with_depth
from slime_spec.bench.tune.workload import Workload
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import Config
from slime_spec.engines import kind_of
from slime_spec.errors import ConfigError, PushError
from slime_spec.interfaces import Engines, Trainer
from slime_spec.speculation.counters import pooled
from slime_spec.types import GeneratedSample, GroupRequest
from slime_spec.weights.run import run_push
from trainer_bridge.layout import check_layout

DEPTH = 3
NUM_REPLIES, NUM_TOKENS = 8, 24
KEPT = 0.5  # of the drafts accepted before, at least: fewer, and the draft is another after the push


@dataclass(frozen=True)
class PushCheck:
    """Holds what one push showed; ``problem`` is "" where nothing is wrong. Accept lengths are tokens a round.

    ``is_verified`` says that every engine's weights were read back and have the trainer's checksum.
    """

    seconds: float = 0.0
    nbytes: int = 0
    is_verified: bool = False
    num_replies: int = 0
    num_same: int = 0
    length_before: float | None = None
    length_after: float | None = None
    problem: str = ""


Parts = Callable[[Config], AbstractContextManager[tuple[Engines, Trainer]]]


def check_push(
    config: Config, candidate: Candidate | None, workload: Workload, parts: Parts | None = None
) -> PushCheck:
    """Send the push and compare greedy replies; ``candidate`` is the draft that must outlive the push, if any.

    ``parts`` starts the engines and the trainer of a configuration; a run's own if None.
    """
    config = _debug_run(config, candidate)
    try:
        with (parts or _parts)(config) as (engines, trainer):
            before = _replies(engines, workload)
            report = run_push(trainer.push(1), engines.broadcast, verify=True)
            after = _replies(engines, workload)
    except (ConfigError, PushError) as error:
        return PushCheck(problem=str(error))
    check = PushCheck(
        seconds=report.seconds,
        nbytes=report.nbytes,
        is_verified=report.verified,
        num_replies=len(before),
        num_same=sum(a.token_ids == b.token_ids for a, b in zip(before, after, strict=True)),
        length_before=accept_length(before),
        length_after=accept_length(after),
    )
    return replace(check, problem=problem_of(check, {sample.weight_version for sample in after}))


def problem_of(check: PushCheck, versions: set[int]) -> str:
    """Return what is wrong after the push, "" if nothing is."""
    if versions != {1}:
        return f"after the push engines generated with versions {sorted(versions)}, not with 1"
    before, after = check.length_before, check.length_after
    if before is not None and (after is None or after - 1.0 < KEPT * (before - 1.0)):
        return f"the draft was lost: {before:.2f} tokens a round before the push, {after or 1.0:.2f} after it"
    return ""


def accept_length(samples: Sequence[GeneratedSample]) -> float | None:
    """Return accepted drafts and bonus tokens a round; None where no round was."""
    spec = pooled(sample.spec for sample in samples)
    return 1.0 + spec.num_correct / spec.num_rounds if spec.num_rounds else None


def _debug_run(config: Config, candidate: Candidate | None) -> Config:
    """Return the configuration of the push: one draft length, so that acceptance before and after can be compared.

    A server's candidate has its own.
    """
    speculative = config.speculative
    if candidate is not None and kind_of(config).has_servers:
        speculative = candidate.settings
    elif candidate is not None:
        speculative = with_depth(candidate.settings, DEPTH)
    return replace(
        config,
        run=replace(config.run, mode="train", num_rollout=1),
        engine=replace(config.engine, cost_probe_interval=0),
        speculative=speculative,
    )


@contextmanager
def _parts(config: Config) -> Iterator[tuple[Engines, Trainer]]:
    """Start a trainer and engines on Ray, the trainer first, as a run does."""
    from rollout.pool import EnginePool
    from slime_spec.launch.cluster import cluster
    from trainer_bridge.megatron.group import MegatronGroup

    spec = ModelSpec.from_folder(config.model.hf_checkpoint)
    check_layout(config, spec)
    with cluster(config, spec) as reserved:
        trainer = MegatronGroup(config, reserved.ranks)
        try:
            trainer.load()
            with EnginePool(config, reserved.engines) as engines:
                engines.start()
                yield engines, trainer
        finally:
            trainer.stop()


def _replies(engines: Engines, workload: Workload) -> list[GeneratedSample]:
    """Return greedy replies in the prompts' order."""
    params = replace(workload.params, temperature=0.0, max_new_tokens=NUM_TOKENS)
    requests = [
        GroupRequest(str(number), prompt.token_ids, (number,), params)
        for number, prompt in enumerate(workload.prompts[:NUM_REPLIES])
    ]
    return sorted(engines.generate(requests), key=lambda sample: int(sample.group_id))
