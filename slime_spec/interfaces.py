"""Each Protocol here is the interface of one thing that varies; the tables map a setting to its class.

An implementation is imported only when its name is chosen, so that a run loads only the libraries it uses.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from slime_spec.errors import ConfigError
from slime_spec.garbage import no_collection
from slime_spec.request_feed import RequestFeed
from slime_spec.suggest import did_you_mean
from slime_spec.types import (
    DraftUpdateRecord,
    EarlierReply,
    EngineStats,
    GeneratedSample,
    GroupRequest,
    Prompt,
    TrainReport,
    TrainSample,
)

if TYPE_CHECKING:
    import torch

    from slime_spec.config.tree import Config
    from slime_spec.weights.messages import NamedTensors, Opening, PushBucket, PushMessage, PushReply, Side


Choice = TypeVar("Choice")
BringUp = Callable[[int, Callable[["PushMessage"], Sequence["PushReply"]]], bool]
"""Brings an engine, which its broadcast alone reaches, to the weights that the others serve; False: not yet."""


class Generation(Protocol):
    """Yields the samples of one in-flight group; iterating blocks until the next sample finishes."""

    def __iter__(self) -> Iterator[GeneratedSample]: ...

    def abort(self) -> None:
        """Let the unfinished samples finish now, with finish_reason "abort" and the tokens they have.

        A later request resumes the samples that it names in ``partials``.
        """

    def learn(self, replies: Sequence[EarlierReply]) -> None:
        """Draft from these replies too, of samples of the same group that finished elsewhere; no sample changes."""


class RolloutEngine(Protocol):
    """Turns prompts into samples. ``generate`` may be called from several threads; the rest from one at a time."""

    def start(self) -> None:
        """Load the checkpoint's weights (version 0) and get ready to generate."""

    def generate(self, request: GroupRequest) -> Generation:
        """Queue a group; raises ConfigError for a request that can never run (prompt beyond the context, ...)."""

    def update_weights(self, message: PushMessage) -> PushReply:
        """Take one message of a push, or of a pause around it; raises PushError and keeps the version."""

    def set_resident(self, resident: bool) -> None:
        """Free the KV cache (and, on CUDA, the weights) or take them back; only while no request is running."""

    def stats(self) -> EngineStats: ...

    def stop(self) -> None: ...


@runtime_checkable
class MayStopServing(Protocol):
    """Reports whether an engine serves, whose server may die and come back while the engine itself lives on."""

    def wait_serving(self, known: bool) -> bool:
        """Wait until the engine serves or not, other than ``known``, and return it; raises when it never will again."""


@runtime_checkable
class MayServeLater(Protocol):
    """Starts apart: nobody else's requests reach the engine until it has the weights that the others serve."""

    def start_apart(self) -> None:
        """Do what ``start`` does, but for ``serve``."""

    def serve(self) -> None:
        """Let others' requests come, and see that none go to the process in whose place this one is."""


class Engines(Protocol):
    """Runs all engines of a run as one: the RL loop sees nothing else of the rollout side."""

    def generate(self, requests: Sequence[GroupRequest] | RequestFeed) -> Iterator[GeneratedSample]:
        """Yield every group's samples in the order in which they finish, whichever engine they ran on.

        The groups of a feed may come while it runs, until the feed is closed.
        """

    def receivers(self) -> tuple[int, ...]:
        """Begin a push, and return the engines that it reaches: those that live."""

    def broadcast(self, message: PushMessage) -> list[PushReply]:
        """Deliver one push message to every engine that lives; raises if any refuses."""

    def leave_out_failed(self, refusing: bool) -> bool:
        """After a push that failed, give up the engines that died in it; False where there are none.

        If ``refusing``, also those that refused it, or did not answer, while others did not. Another engine will be
        made in the place of each, so it may be the last.
        """

    def bring_up_with(self, bring_up: BringUp) -> None:
        """From now on bring engines that are made in place of dead ones to the others' weights with this."""

    def set_resident(self, resident: bool) -> list[EngineStats]: ...

    def stats(self) -> list[EngineStats]: ...

    def abort(self) -> None:
        """Let every sample of the generation in progress end now, with finish_reason "abort" and the tokens it has.

        All come out of ``generate``, waiting samples too. A later ``generate`` resumes the samples that a request names
        in ``partials``, on any engine and with newer weights; ``version_spans`` say which version generated which
        tokens.
        """

    def stop(self) -> None: ...


class SharedPart(Protocol):
    """Runs what all engines of a run share, such as a router: it starts before the engines and ends after them."""

    @property
    def engine_config(self) -> Config:
        """Return the configuration of the engines that use the shared part."""

    def start(self) -> None:
        """Start the shared part without waiting for it; the engines start meanwhile."""

    def wait_until_ready(self) -> None:
        """Return once the shared part serves; raises ConfigError where it does not start."""

    def stop(self) -> None: ...


class Trainer(Protocol):
    """Owns the policy's weights and their integer version."""

    def load(self) -> RunState | None:
        """Build the model from the HF checkpoint, or resume when trainer.load is set and return where the run was."""

    def step(self, samples: Sequence[TrainSample], learns_draft: bool = True) -> TrainReport:
        """Run the policy step(s) for one rollout's samples; a draft in training learns from them, or not this time."""

    def push(
        self, version: int, side: Side = "target", receivers: Sequence[int] = (), is_new: bool = False
    ) -> Generator[PushMessage, None, None]:
        """Yield a side's weights as one push's messages: begin, buckets, commit (slime_spec.weights.messages).

        ``receivers`` are the engines that take part, without them all; ``is_new`` as in Opening. The side draft only
        where the trainer trains it. Closing the generator gives the push up.
        """

    def save(self, folder: str, state: RunState) -> None:
        """Write a checkpoint that ``load`` resumes from; a failed write leaves the previous one intact."""

    def export_hf(self, folder: str, draft_folder: str | None = None) -> None:
        """Write the policy as an ordinary Hugging Face checkpoint folder, and a draft that was trained as its own."""

    def stop(self) -> None: ...


class WeightTransport(Protocol):
    """Carries one bucket's tensors from trainer to engines; both ends live in one file.

    A transport that ``lends`` has received tensors in memory that is not the engine's: they are valid until
    ``release``. All others' are valid as long as they are referenced.
    """

    lends: bool

    def open(self, host: str, opening: Opening) -> Any:
        """Get ready for a push, on the side of a trainer's rank, which engines reach at ``host``.

        Returns what BeginPush tells the engines of it, or None.
        """

    def publish(self, named: NamedTensors) -> tuple[Any, ...]:
        """Make the tensors of a bucket reachable, on the trainer's side, until the bucket after the next is published.

        Returns the handle that a PushBucket carries; handles of ranks that publish the same bucket may be joined.
        """

    def join(self, routes: Sequence[Any], place: int) -> None:
        """Note what the ranks' ``open`` have returned, on the engine's side; nothing is waited for.

        ``place`` is the engine's among those that take part.
        """

    def receive(self, bucket: PushBucket) -> list[torch.Tensor]:
        """Return the bucket's tensors, on the engine's side, read-only; raises PushError where it cannot."""

    def release(self) -> None:
        """Give a lent bucket back once all that reads it has been done, on the engine's side."""

    def close(self) -> None:
        """Free what the transport holds for the push, on either side: it has all its buckets, or it has failed."""


@dataclass(frozen=True)
class RunState:
    """Says where the run is: saved with the trainer's checkpoint, so that a resumed run draws the same next prompts.

    ``unfinished_prompt_ids`` were drawn and not trained on yet: the next step begins with them, and resumes their
    partial samples as long as the run's process lives. ``is_ahead`` says that the trainer's weights are newer than
    those that were pushed as ``weight_version``. ``draft_updates`` is None where no draft is trained.
    """

    rollout_id: int
    next_prompt_id: int
    weight_version: int
    unfinished_prompt_ids: tuple[int, ...] = ()
    is_ahead: bool = False
    draft_updates: DraftUpdateRecord | None = None

    @classmethod
    def of_checkpoint(cls, saved: Mapping[str, Any]) -> RunState:
        """Return the state that a checkpoint holds; the weights of one that does not say so count as never pushed."""
        updates = saved.get("draft_updates")
        record = None if updates is None else DraftUpdateRecord(**updates)
        return cls(**{"is_ahead": True, **saved, "draft_updates": record})


class MetricSink(Protocol):
    """Writes each step's metrics to one place."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Problem:
    """A question of a task before tokenisation has the user's text and the answer that a right reply contains.

    ``advice`` is a text that the reply will resemble, empty where nobody knows it. ``messages`` is the whole chat where
    the question is more than one user message, and ``text`` then its last text; ``tools`` are JSON schemas for the
    chat template. ``label`` and ``metadata`` are a Prompt's.
    """

    text: str
    answer: str
    advice: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    label: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Makes prompts and rewards the replies."""

    @property
    def name(self) -> str: ...

    def problem(self, index: int, seed: int) -> Problem:
        """Return the problem with this index: a pure function of (index, seed)."""

    def reward(self, problem: Prompt, reply: str) -> float: ...


def unknown_choice(setting: str, known: Iterable[str], name: str) -> ConfigError:
    """Make the error for a name that is not in ``known``, with a suggestion where a known name is near."""
    names = sorted(known)
    hint = did_you_mean(name, names, repr)
    return ConfigError(setting, f"must be one of {', '.join(names)}", name, f"{hint}Choose a known name.")


def choose(setting: str, table: Mapping[str, Choice], name: str) -> Choice:
    """Return the table's entry for ``name``; raises ConfigError for an unknown name."""
    if name not in table:
        raise unknown_choice(setting, table, name)
    return table[name]


def load(path: str) -> Any:
    """Import the object that a path ``package.module:name`` names."""
    module, _, attribute = path.partition(":")
    with no_collection():
        return getattr(importlib.import_module(module), attribute)


def load_choice(setting: str, table: Mapping[str, str], name: str) -> Any:
    """Import the implementation whose path a table has for ``name``."""
    return load(choose(setting, table, name))


SINKS = {
    "jsonl": "slime_spec.metrics.jsonl:JsonlSink",
    "console": "slime_spec.metrics.console:ConsoleSink",
    "wandb": "slime_spec.metrics.wandb:WandbSink",
    "report": "slime_spec.metrics.report:ReportSink",
    "tensorboard": "slime_spec.metrics.tensorboard:TensorBoardSink",
    "null": "slime_spec.metrics.null:NullSink",
    "alarm": "slime_spec.metrics.alarm:AcceptanceAlarm",
}
