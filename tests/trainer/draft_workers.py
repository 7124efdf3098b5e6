"""What a rank that trains a draft does in a test; see rank_workers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from megatron.core import parallel_state as mpu

from slime_spec.config.tree import Config
from slime_spec.draft.training.online import DraftSums, LearnedStep, SeenReply
from slime_spec.draft.unroll import make_unroll
from slime_spec.errors import TrainingError
from slime_spec.interfaces import RunState
from slime_spec.types import TrainReport, TrainSample
from tests.trainer.rank_workers import KeepingTransport, weights_of
from trainer_bridge.draft_rows import ReplyRows
from trainer_bridge.layout import Layout
from trainer_bridge.megatron.draft_side import DraftSide
from trainer_bridge.megatron.pass_capture import KeptRows
from trainer_bridge.megatron.process_groups import process_groups
from trainer_bridge.megatron.rank import TrainerRank
from trainer_bridge.megatron.vocab_parallel import argmax_and_logsumexp


@dataclass(frozen=True)
class DraftRun:
    """A rank's weights of the policy, and of the draft what it publishes, after steps."""

    policy: dict[str, torch.Tensor]
    draft: dict[str, torch.Tensor]
    reports: tuple[TrainReport, ...]


def train_draft(
    rank: int,
    init_method: str,
    config: Config,
    batches: Sequence[Sequence[TrainSample]],
    poisoned: bool = False,
    save_to: str = "",
) -> DraftRun:
    """Train policy and draft; ``poisoned``: the draft's first weight is NaN; ``save_to``: a checkpoint at the end."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    if poisoned and worker.draft is not None and worker.draft.draft is not None:
        with torch.no_grad():
            next(iter(worker.draft.draft.tensors().values())).view(-1)[0] = torch.nan
    reports = tuple(worker.step(batch) for batch in batches)
    if save_to:
        worker.save(save_to, RunState(len(batches), 8, len(batches)))
    pushed: dict[str, torch.Tensor] = {}
    if worker.draft is not None:
        transport = KeepingTransport()
        for bucket in worker.push_buckets(5, transport, side="draft"):
            if bucket is not None:
                received = zip(bucket.tensors, transport.receive(bucket), strict=True)
                pushed |= {meta.name: tensor for meta, tensor in received}
    run = DraftRun(weights_of(worker), pushed, reports)
    worker.close()
    return run


@dataclass(frozen=True)
class DraftBytes:
    """What a step kept of the policy's passes, then of replies, and what one update read."""

    passes: int
    replies: int
    inputs: int


class Weighing:
    """Stands before a DraftSide's capture and draft, and adds up the bytes of what goes through."""

    def __init__(self, side: DraftSide) -> None:
        assert side.draft is not None
        self.capture, self.draft, self.found = side._capture, side.draft, DraftBytes(0, 0, 0)
        self.trainer, self.tensors = side.draft.trainer, side.draft.tensors

    @contextmanager
    def of(self, replies: Sequence[Sequence[ReplyRows]]) -> Iterator[list[KeptRows | None]]:
        with self.capture.of(replies) as kept:
            yield kept
        self.found = replace(self.found, passes=sum(num_bytes(each.kept.values()) for each in kept if each is not None))

    def learn(
        self,
        replies: Sequence[SeenReply],
        num_updates: int,
        target_head: torch.Tensor,
        mask_embedding: torch.Tensor | None,
    ) -> LearnedStep:
        first = [each for each in replies if each.slots[0] < self.draft.trainer.settings.batch_size]
        batch = self.draft._batch(first, target_head, mask_embedding)
        read = num_bytes([batch.features, batch.final, self.draft.trainer.model.embedding])
        states = [(each.embeddings, each.features, each.final, each.argmax, each.logsumexp) for each in replies]
        self.found = replace(self.found, replies=num_bytes(chain.from_iterable(states)), inputs=read)
        return self.draft.learn(replies, num_updates, target_head, mask_embedding)


@dataclass(frozen=True)
class DraftLogits:
    """A reply [tokens], whose first ``prompt_len`` are the prompt, and the draft's first logits [rows, vocab]."""

    slots: tuple[int, ...]
    token_ids: tuple[int, ...]
    prompt_len: int
    logits: torch.Tensor


class Logits:
    """Stands in for a DraftSide's draft, and keeps what it says of a step's replies instead of learning."""

    def __init__(self, side: DraftSide) -> None:
        assert side.draft is not None
        self.draft, self.found = side.draft, list[DraftLogits]()
        self.trainer, self.tensors = side.draft.trainer, side.draft.tensors

    @torch.no_grad()
    def learn(
        self,
        replies: Sequence[SeenReply],
        num_updates: int,
        target_head: torch.Tensor,
        mask_embedding: torch.Tensor | None,
    ) -> LearnedStep:
        # A rank without a reply computes its experts for the others'.
        batch = self.draft._batch(replies or [self.draft._nothing()], target_head, mask_embedding)
        model = self.draft.trainer.model
        unroll = make_unroll(model.network, model.embed, batch.starts, batch.num_rows)
        logits = model.logits(unroll.first(batch.features, batch.token_ids))
        for reply, of_reply in zip(replies, logits, strict=bool(replies)):
            rows = of_reply[: len(reply.final)].clone()
            self.found.append(DraftLogits(reply.slots, tuple(reply.token_ids.tolist()), reply.prompt_len, rows))
        return LearnedStep(DraftSums(torch.zeros(3, self.trainer.settings.num_steps, dtype=torch.float64)), (), 0)


def draft_logits(rank: int, init_method: str, config: Config, samples: Sequence[TrainSample]) -> list[DraftLogits]:
    """What the draft says of the replies that this rank learns from in a step of the policy."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    assert worker.draft is not None
    found: list[DraftLogits] = []
    if worker.draft.draft is not None:
        keeping: Any = Logits(worker.draft)
        worker.draft.draft, found = keeping, keeping.found
    worker.step(samples)
    worker.close()
    return found


def draft_gradients(
    rank: int, init_method: str, config: Config, samples: Sequence[TrainSample]
) -> dict[str, torch.Tensor]:
    """The gradients of the draft's first update, by the network's names; none on ranks that save no draft."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    worker.step(samples)
    assert worker.draft is not None
    gradients = first_gradients(worker.draft.state(on_host=lambda tensor: tensor))
    worker.close()
    return gradients


def first_gradients(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The gradients of a draft's first update, by its moments: Adam's beta of 0.9 keeps a tenth of a gradient."""
    return {name: each["exp_avg"] / 0.1 for name, each in state["optimizer"].items()} if state else {}


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of the tensors' memory; several may share some."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def weigh_draft_step(rank: int, init_method: str, config: Config, samples: Sequence[TrainSample]) -> DraftBytes:
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    assert worker.draft is not None
    weighing: Any = Weighing(worker.draft)
    worker.draft._capture = weighing
    worker.draft.draft = weighing
    worker.step(samples)
    worker.close()
    found: DraftBytes = weighing.found
    return found


def push_draft_everywhere(rank: int, init_method: str, config: Config) -> dict[str, torch.Tensor]:
    """What this rank publishes of the draft where every rank publishes."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    transport = KeepingTransport()
    pushed = {}
    for bucket in worker.push_buckets(5, transport, every_rank=True, side="draft"):
        assert bucket is not None, "every rank publishes"
        pushed |= {meta.name: each for meta, each in zip(bucket.tensors, transport.receive(bucket), strict=True)}
    worker.close()
    return pushed


def export_draft(
    rank: int, init_method: str, config: Config, batches: Sequence[Sequence[TrainSample]], folder: str
) -> None:
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    for batch in batches:
        worker.step(batch)
    worker.export_hf(f"{folder}/hf", f"{folder}/draft")
    worker.close()


def diverged_step(rank: int, init_method: str, config: Config, samples: Sequence[TrainSample]) -> tuple[str, bool]:
    """The error of a step whose policy computes NaN, and whether the draft is as it was."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    own = {} if worker.draft is None or worker.draft.draft is None else worker.draft.draft.tensors()
    before = {name: tensor.clone() for name, tensor in own.items()}
    with torch.no_grad():
        next(worker.model.parameters()).view(-1)[:] = torch.nan
    try:
        worker.step(samples)
    except TrainingError as error:
        return str(error), all(torch.equal(tensor, before[name]) for name, tensor in own.items())
    finally:
        worker.close()
    return "", False


def sliced_peaks(
    rank: int, init_method: str, logits: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's view of the argmax and logsumexp of logits of which it has a half."""
    with process_groups(Layout(tensor=2, pipeline=1, data=1), rank, init_method, seed=0):
        return argmax_and_logsumexp(logits.chunk(2, dim=1)[rank], temperature, mpu.get_tensor_model_parallel_group())
