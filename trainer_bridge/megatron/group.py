"""MegatronGroup drives all trainer ranks in step, as one Trainer: there is a Ray actor per rank.

    driver: MegatronGroup ──► rank 0 ─┐
                          ──► rank 1 ─┼─ gloo / nccl
                          ──► ...    ─┘
Samples go to the ranks through one object; weights go from the ranks to the transport, and only handles and checksums
come through the driver.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime_spec.checkpoints.draft_choice import trainable_draft
from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import draft_shapes
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.config.draft_training import loss_for
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError, PushError, TrainingError
from slime_spec.interfaces import RunState
from slime_spec.placement import Placement
from slime_spec.ray_errors import result_of
from slime_spec.transports.choice import every_rank_publishes
from slime_spec.types import TrainReport, TrainSample
from slime_spec.weights.checksums import combined_checksum
from slime_spec.weights.messages import (
    CommitPush,
    Manifest,
    Opening,
    PushBucket,
    PushMessage,
    Side,
)
from slime_spec.weights.run import begin_of
from slime_spec.weights.served import ServedForm
from trainer_bridge.checkpoint_folder import resolve_checkpoint
from trainer_bridge.layout import check_layout
from trainer_bridge.megatron.actor import RankActor

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class MegatronGroup:
    """Implements Trainer; ``placement`` says where each rank runs and with how much.

    Actors may have another working directory than the driver: folders given to methods are made absolute here, those
    in ``config`` (model.hf_checkpoint, trainer.load) must be reachable from both.
    """

    def __init__(self, config: Config, placement: Placement) -> None:
        self.config = config
        self.spec = ModelSpec.from_folder(config.model.hf_checkpoint)
        self.layout = check_layout(config, self.spec)
        self._draft_shapes: Mapping[str, tuple[int, ...]] = {}
        self._draft_in_target = False
        settings = config.draft_training
        if settings.enable:
            draft = trainable_draft(config, self.spec).spec
            assert isinstance(draft, DraftSpec), "a whole model is not trained"
            self._draft_shapes, self._draft_in_target = draft_shapes(draft), draft.in_target
            logger.info("chose the draft's loss family=%s loss=%s", draft.family, loss_for(settings, draft.family))
        if config.trainer.load is not None:
            resolve_checkpoint(config.trainer.load)
        self._pushed_version = 0
        self._open_push: Generator[PushMessage, None, None] | None = None
        self.actors = [_start_actor(config, rank, placement) for rank in range(self.layout.world_size)]

    def load(self) -> RunState | None:
        init_method = _result(self.actors[0].address.remote(), self.config.cluster.actor_start_timeout_s)
        states: list[RunState | None] = all_results([actor.load.remote(init_method) for actor in self.actors])
        if states[0] is not None:
            self._pushed_version = states[0].weight_version
        return states[0]

    def step(self, samples: Sequence[TrainSample], learns_draft: bool = True) -> TrainReport:
        self._end_push()
        shared = ray.put(tuple(samples))
        try:
            reports: list[TrainReport] = all_results([actor.step.remote(shared, learns_draft) for actor in self.actors])
        except TrainingError as error:
            raise TrainingError(f"after weight version {self._pushed_version}: {error}") from None
        return reports[0]

    def push(
        self, version: int, side: Side = "target", receivers: Sequence[int] = (), is_new: bool = False
    ) -> Generator[PushMessage, None, None]:
        """Return the messages: the begin, then every stage's buckets in order as they are published, then the commit.

        The last stage has the draft.

        A push that was not read to its end is given up when it is closed, or when the next command comes.
        """
        self._end_push()
        self._pushed_version = version
        self._open_push = self._messages(Opening(side, version, tuple(receivers) or self._engines, is_new))
        return self._open_push

    def save(self, folder: str, state: RunState) -> None:
        self._end_push()
        all_results([actor.save.remote(str(Path(folder).absolute()), state) for actor in self.actors])

    def export_hf(self, folder: str, draft_folder: str | None = None) -> None:
        self._end_push()
        of_draft = None if draft_folder is None else str(Path(draft_folder).absolute())
        all_results([actor.export_hf.remote(str(Path(folder).absolute()), of_draft) for actor in self.actors])

    def stop(self) -> None:
        """End the actors; safe after a rank has failed, when the others may hang in a collective."""
        for actor in self.actors:
            ray.kill(actor)

    def peak_rss_bytes(self) -> int:
        """Return the most memory the ranks have used, summed."""
        return sum(all_results([actor.peak_rss_bytes.remote() for actor in self.actors]))

    def _end_push(self) -> None:
        """Give up a push that was not read to its end, and with it the shared memory that the ranks hold for it."""
        if self._open_push is not None:
            self._open_push.close()
            self._open_push = None

    @property
    def _engines(self) -> tuple[int, ...]:
        return tuple(range(self.config.rollout.num_engines))

    def _messages(self, opening: Opening) -> Generator[PushMessage, None, None]:
        side, version = opening.side, opening.version
        checksums: list[tuple[str, int]] = []
        num_buckets = 0
        last = self.layout.pipeline - 1
        stages = range(last, last + 1) if side == "draft" else range(last + 1)
        try:
            firsts = [self.actors[self.layout.holders(stage)[0]] for stage in stages]
            routes = all_results([first.open_push.remote(opening) for first in firsts])
            yield begin_of(self._manifest(version, side), routes, opening.receivers)
            for stage in stages:
                for bucket in self._stage_buckets(stage, version, side):
                    checksums += zip((meta.name for meta in bucket.tensors), bucket.checksums, strict=True)
                    yield replace(bucket, index=num_buckets)
                    num_buckets += 1
        finally:
            # Not waited for: an actor runs its calls in order, and after a failure one may hang in a collective.
            for actor in self.actors:
                actor.end_push.remote()
        yield CommitPush(version, combined_checksum(checksums))

    def _manifest(self, version: int, side: Side) -> Manifest:
        """List the tensors in the model's order, as engines have them: the engines' weights can then be compared."""
        if side == "target":
            return Manifest(side, version, ServedForm.of(self.config).metas(expected_shapes(self.spec)))
        return Manifest(side, version, ServedForm.of(self.config, self._draft_in_target).metas(self._draft_shapes))

    def _stage_buckets(self, stage: int, version: int, side: Side) -> Iterator[PushBucket]:
        """Yield the stage's buckets, which its holders gather together; of the draft these are all its ranks.

        While the engines take a bucket the ranks make the next, and no more: a transport has room for two.
        """
        is_of_all = side == "draft" or every_rank_publishes(self.config)
        ranks = self.layout.ranks(stage) if is_of_all else self.layout.holders(stage)
        actors = [self.actors[rank] for rank in ranks]
        coming = [actor.next_bucket.remote(version, side) for actor in actors]
        while made := [bucket for bucket in all_results(coming) if bucket is not None]:
            coming = [actor.next_bucket.remote(version, side) for actor in actors]
            yield joined(made)


def joined(buckets: Sequence[PushBucket]) -> PushBucket:
    """Return the bucket that several ranks have published as one, with all their handles.

    Raises PushError where the ranks hold different weights.
    """
    first = buckets[0]
    for other in buckets[1:]:
        sums = zip(first.tensors, first.checksums, other.checksums, strict=True)
        if wrong := [meta.name for meta, ours, theirs in sums if ours != theirs]:
            raise PushError(f"the trainer's ranks hold different weights of {', '.join(wrong[:3])}")
    return replace(first, handle=tuple(handle for bucket in buckets for handle in bucket.handle))


def _start_actor(config: Config, rank: int, placement: Placement) -> Any:
    num_gpus = placement.num_gpus_of_rank(rank)
    # Waiting threads sleep instead of spinning: engines and ranks may share cores.
    env = {
        "OMP_NUM_THREADS": str(config.trainer.num_cpus_per_rank),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if not num_gpus:
        env["CUDA_VISIBLE_DEVICES"] = ""
    remote = ray.remote(RankActor).options(
        num_cpus=placement.num_cpus_of_rank(rank),
        num_gpus=num_gpus,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement.placement_group, placement_group_bundle_index=placement.bundle_of_rank(rank)
        ),
        runtime_env={"env_vars": env},
    )
    return remote.remote(config, rank)


def _result(ref: Any, timeout_s: float | None = None) -> Any:
    """See result_of; a timeout is a ConfigError."""
    try:
        return result_of(ref, timeout_s)
    except GetTimeoutError:
        raise ConfigError(
            "cluster.actor_start_timeout_s",
            "must be long enough for the trainer's actors to start",
            timeout_s,
            "Raise it, or look in Ray's logs why the actor does not start.",
        ) from None


def all_results(refs: Sequence[Any]) -> list[Any]:
    """Return every value, in order; raises as soon as any one fails, since the others may then wait for it for ever."""
    values = {}
    pending = list(refs)
    while pending:
        done, pending = ray.wait(pending, num_returns=1)
        values[done[0]] = _result(done[0])
    return [values[ref] for ref in refs]
