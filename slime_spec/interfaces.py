"""The seams: one narrow Protocol per thing that varies, and the tables from a setting to its class.

An implementation is imported only when its name was chosen, so that no run pays for a library it does not use.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from slime_spec.errors import ConfigError
from slime_spec.suggest import did_you_mean
from slime_spec.types import EngineStats, GeneratedSample, GroupRequest, Prompt, TrainReport, TrainSample

if TYPE_CHECKING:
    import torch

    from slime_spec.config.tree import Config
    from slime_spec.weights.messages import PushBucket, PushMessage, PushReply


Choice = TypeVar("Choice")


class Generation(Protocol):
    """The samples of one group while they are being generated; iterating blocks until the next one finishes."""

    def __iter__(self) -> Iterator[GeneratedSample]: ...

    def abort(self) -> None:
        """Let the unfinished samples finish now, with finish_reason "abort" and the tokens they have.

        A later request resumes them where it names them in ``partials``.
        """


class RolloutEngine(Protocol):
    """Turns prompts into samples. ``generate`` may be called from several threads; the rest from one at a time."""

    def start(self) -> None:
        """Load the checkpoint's weights (version 0) and be ready to generate."""

    def generate(self, request: GroupRequest) -> Generation:
        """Queue a group; raises ConfigError for a request that can never run (prompt beyond the context, ...)."""

    def update_weights(self, message: PushMessage) -> PushReply:
        """Take one message of a push, or of a pause around it; raises PushError and keeps its version."""

    def set_resident(self, resident: bool) -> None:
        """Free the KV cache (and, on CUDA, the weights) or take them back; only while no request is running."""

    def stats(self) -> EngineStats: ...

    def stop(self) -> None: ...


@runtime_checkable
class MayStopServing(Protocol):
    """An engine whose server may die and come back while the engine itself lives on."""

    def wait_serving(self, known: bool) -> bool:
        """Return whether it serves, once that is not what is ``known``; raises when it never will again."""


class Engines(Protocol):
    """All engines of a run as one: what the RL loop sees of the rollout side."""

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[GeneratedSample]:
        """Every group's samples, in the order in which they finish, whichever engine they began on."""

    def broadcast(self, message: PushMessage) -> list[PushReply]:
        """Deliver one push message to every engine; raises if any refuses."""

    def set_resident(self, resident: bool) -> list[EngineStats]: ...

    def stats(self) -> list[EngineStats]: ...

    def abort(self) -> None:
        """Let every sample of the generation in progress end now, with finish_reason "abort" and the tokens it has.

        They come out of ``generate``, those too whose turn had not come. A later ``generate`` resumes those that a
        request names in ``partials``, on any engine and with newer weights; ``version_spans`` say which tokens are
        whose.
        """

    def stop(self) -> None: ...


class SharedPart(Protocol):
    """What all engines of a run share, such as a router: started before them, ended after them."""

    @property
    def engine_config(self) -> Config:
        """The configuration of the engines that use it."""

    def start(self) -> None:
        """Begin to start it; the engines start meanwhile."""

    def wait_until_ready(self) -> None:
        """Return once it serves; raises ConfigError where it does not start."""

    def stop(self) -> None: ...


class Trainer(Protocol):
    """Owns the policy's weights and their integer version."""

    def load(self) -> RunState | None:
        """Build the model from the HF checkpoint, or resume (and say where the run was) when trainer.load is set."""

    def step(self, samples: Sequence[TrainSample]) -> TrainReport:
        """Run the policy step(s) for one rollout's samples."""

    def push(self, version: int) -> Iterator[PushMessage]:
        """The current weights as the messages of one push: begin, buckets, commit (slime_spec.weights.messages)."""

    def save(self, folder: str, state: RunState) -> None:
        """Write a checkpoint that ``load`` resumes from; a failed write leaves the previous one intact."""

    def export_hf(self, folder: str) -> None:
        """Write the policy as an ordinary Hugging Face checkpoint folder."""

    def stop(self) -> None: ...


class WeightTransport(Protocol):
    """Carries one bucket's tensors from trainer to engines; both ends live in one file."""

    def publish(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Trainer side: make the tensors reachable and return the handle that a PushBucket carries."""

    def receive(self, bucket: PushBucket) -> list[torch.Tensor]:
        """Engine side: the bucket's tensors, read-only; they stay valid as long as they are referenced."""


@dataclass(frozen=True)
class RunState:
    """Where the run is: saved with the trainer's checkpoint, so that a resumed run draws the same next prompts.

    ``unfinished_prompt_ids`` were drawn and not trained on yet: the next step begins with them, and with what the
    engines have generated of them as long as the run's process lives.
    """

    rollout_id: int
    next_prompt_id: int
    weight_version: int
    unfinished_prompt_ids: tuple[int, ...] = ()


class MetricSink(Protocol):
    """A place where one step's metrics go."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Problem:
    """One question of a task before tokenisation: what the user says, and what a right reply contains.

    ``advice`` is a text that the reply will resemble, empty where nobody knows one.
    """

    text: str
    answer: str
    advice: str = ""


class Task(Protocol):
    """Prompts and their reward."""

    @property
    def name(self) -> str: ...

    def problem(self, index: int, seed: int) -> Problem:
        """The problem with this index: a pure function of (index, seed)."""

    def reward(self, problem: Prompt, reply: str) -> float: ...


def unknown_choice(setting: str, known: Iterable[str], name: str) -> ConfigError:
    """The error for a name that is none of ``known``, with a suggestion where one is near."""
    names = sorted(known)
    hint = did_you_mean(name, names, repr)
    return ConfigError(setting, f"must be one of {', '.join(names)}", name, f"{hint}Choose a known name.")


def choose(setting: str, table: Mapping[str, Choice], name: str) -> Choice:
    """What ``name`` stands for in the table; raises ConfigError for an unknown name."""
    if name not in table:
        raise unknown_choice(setting, table, name)
    return table[name]


def load(path: str) -> Any:
    """Import what a path names that reads ``package.module:name``."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def load_choice(setting: str, table: Mapping[str, str], name: str) -> Any:
    """Import the implementation that ``name`` stands for in a table of paths."""
    return load(choose(setting, table, name))


SINKS = {
    "jsonl": "slime_spec.metrics.jsonl:JsonlSink",
    "console": "slime_spec.metrics.console:ConsoleSink",
    "wandb": "slime_spec.metrics.wandb:WandbSink",
    "null": "slime_spec.metrics.null:NullSink",
    "alarm": "slime_spec.metrics.alarm:AcceptanceAlarm",
}
