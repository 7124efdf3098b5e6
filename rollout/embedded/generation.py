"""A generation gives its caller the samples of one group as they finish, or the error that ended it or the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue

from rollout.embedded.request import Group
from slime_spec.errors import GenerationError
from slime_spec.types import EarlierReply, GeneratedSample


class EmbeddedGeneration:
    """Iterates over the samples of one group: the engine's thread delivers them, the caller's thread iterates."""

    group: Future[Group]

    def __init__(
        self, num_samples: int, abort: Callable[[], None], learn: Callable[[Sequence[EarlierReply]], None]
    ) -> None:
        self._num_left = self._num_undelivered = num_samples
        self._abort, self._learn = abort, learn
        self._arrived: SimpleQueue[GeneratedSample | BaseException] = SimpleQueue()

    def __iter__(self) -> Iterator[GeneratedSample]:
        while self._num_left:
            arrived = self._arrived.get()
            if isinstance(arrived, GenerationError):
                raise arrived
            if isinstance(arrived, BaseException):
                raise RuntimeError("the engine stopped before the group was finished") from arrived
            self._num_left -= 1
            yield arrived

    def abort(self) -> None:
        self._abort()

    def learn(self, replies: Sequence[EarlierReply]) -> None:
        self._learn(replies)

    def deliver(self, sample: GeneratedSample) -> bool:
        """Hand over one finished sample; True when it was the last."""
        self._num_undelivered -= 1
        self._arrived.put(sample)
        return self._num_undelivered == 0

    def fail(self, error: BaseException) -> None:
        """Wake the caller with ``error``."""
        self._arrived.put(error)
