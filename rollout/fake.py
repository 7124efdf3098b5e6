"""A rollout engine without a model, for tests of everything around engines; ships so that users' tests can have it too.

Its "samples" are a pure function of the prompt and the seed, its weights are whatever was pushed.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import torch

from slime_spec.config.tree import Config
from slime_spec.errors import PushError
from slime_spec.hf.checkpoint import expected_shapes
from slime_spec.hf.model_spec import ModelSpec
from slime_spec.interfaces import WeightTransport
from slime_spec.types import EngineStats, GeneratedSample, GroupRequest, SpecCounters
from slime_spec.weights.manifest import combined_checksum, tensor_checksum
from slime_spec.weights.push import (
    BeginPush,
    CancelPush,
    CommitPush,
    ContinueGeneration,
    PauseGeneration,
    PreparePush,
    PushBucket,
    PushMessage,
    PushReceiver,
    PushReply,
    VerifyPush,
)


class FakeGeneration:
    """Samples of one group, made as they are asked for."""

    def __init__(self, request: GroupRequest, engine: int, version: int) -> None:
        self._request, self._engine, self._version = request, engine, version
        self._aborted = threading.Event()

    def abort(self) -> None:
        self._aborted.set()

    def __iter__(self) -> Iterator[GeneratedSample]:
        for index, seed in enumerate(self._request.seeds):
            yield self._sample(index, seed)

    def _sample(self, index: int, seed: int) -> GeneratedSample:
        rng = random.Random(seed)
        aborted = self._aborted.is_set()
        length = 0 if aborted else rng.randint(1, self._request.params.max_new_tokens)
        return GeneratedSample(
            group_id=self._request.group_id,
            sample_index=index,
            token_ids=tuple(rng.randrange(32, 127) for _ in range(length)),
            logprobs=tuple(-rng.random() for _ in range(length)),
            finish_reason="abort" if aborted else "stop",
            weight_version=self._version,
            num_prompt_tokens=len(self._request.prompt_token_ids),
            spec=SpecCounters(num_rounds=2, num_proposed=6, histogram=(1, 1), num_drafted=6),
            engine=self._engine,
        )


class FakeEngine:
    """Implements RolloutEngine; ``fail_bucket`` makes it refuse that bucket of every push."""

    def __init__(
        self, config: Config, engine_index: int, transport: WeightTransport, fail_bucket: int | None = None
    ) -> None:
        self._config, self._index, self._transport = config, engine_index, transport
        self._fail_bucket = fail_bucket
        self._version = 0
        self._resident = True
        self._receiver: PushReceiver | None = None
        self._staged: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}

    def start(self) -> None:
        self._spec = ModelSpec.from_folder(self._config.model.hf_checkpoint)

    def generate(self, request: GroupRequest) -> FakeGeneration:
        return FakeGeneration(request, self._index, self._version)

    def update_weights(self, message: PushMessage) -> PushReply:
        match message:
            case BeginPush():
                self._receiver = PushReceiver(message.manifest, expected_shapes(self._spec))
                self._staged = {}
            case PushBucket():
                self._take(message)
            case PreparePush():
                assert self._receiver is not None, "a prepare follows a begin"
                self._receiver.finish(message.checksum)
            case CommitPush():
                self.weights, self._version = self._staged, message.version
            case VerifyPush():
                sums = ((name, tensor_checksum(tensor)) for name, tensor in self.weights.items())
                return PushReply(self._index, self._version, combined_checksum(sums))
            case CancelPush():
                self._receiver, self._staged = None, {}
            case PauseGeneration() | ContinueGeneration():
                pass  # its samples are made when they are asked for
        checksum = self._receiver.checksum if self._receiver else ""
        return PushReply(self._index, self._version, checksum)

    def _take(self, bucket: PushBucket) -> None:
        assert self._receiver is not None, "a bucket follows a begin"
        if bucket.index == self._fail_bucket:
            raise PushError(f"engine {self._index} refused bucket {bucket.index}, as it was told to")
        tensors = self._transport.receive(bucket)
        self._receiver.take(bucket, tensors)
        self._staged |= {meta.name: tensor.clone() for meta, tensor in zip(bucket.tensors, tensors, strict=True)}

    def set_resident(self, resident: bool) -> None:
        self._resident = resident

    def stats(self) -> EngineStats:
        return EngineStats(
            weight_version=self._version,
            num_running=0,
            num_waiting=0,
            kv_tokens_used=0,
            kv_tokens_capacity=self._config.engine.max_total_tokens or 0,
            resident=self._resident,
            rss_bytes=0,
        )

    def stop(self) -> None:
        self._resident = False
