"""The fake engine has no model: it is for tests of everything around engines, users' own tests included.

Its samples are a pure function of the request and the seed, its weights are the last pushed tensors.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.config.tree import Config
from slime_spec.errors import PushError
from slime_spec.interfaces import WeightTransport
from slime_spec.partial_samples import check_partials, earlier_part, note_version, reported_spans
from slime_spec.site import HERE, Site
from slime_spec.speculation.counters import pooled
from slime_spec.types import EarlierReply, EngineStats, GeneratedSample, GroupRequest, SpecCounters
from slime_spec.weights.checksums import combined_checksum, tensor_checksum
from slime_spec.weights.messages import (
    Manifest,
    PauseMode,
    PushBucket,
    PushMessage,
    PushReply,
    Side,
)
from slime_spec.weights.receive import PushDesk, PushStage

TOKENS = range(32, 127)  # whatever the model's vocabulary
ROUNDS = SpecCounters(num_rounds=2, num_proposed=6, histogram=(1, 1), num_drafted=6)


class FakeGeneration:
    """Makes the samples of one group as the caller asks for them; an aborted sample gets half of its missing tokens."""

    def __init__(self, request: GroupRequest, engine: int, version: int) -> None:
        self._request, self._engine, self._version = request, engine, version
        self._aborted = threading.Event()
        self.learned: list[EarlierReply] = []

    def abort(self) -> None:
        self._aborted.set()

    def learn(self, replies: Sequence[EarlierReply]) -> None:
        self.learned += replies

    def __iter__(self) -> Iterator[GeneratedSample]:
        for position, seed in enumerate(self._request.seeds):
            yield self._sample(position, seed)

    def _sample(self, position: int, seed: int) -> GeneratedSample:
        rng = random.Random(seed)
        length = rng.randint(1, self._request.params.max_new_tokens)
        token_ids = tuple(rng.choice(TOKENS) for _ in range(length))
        logprobs = tuple(-rng.random() for _ in range(length))
        part = earlier_part(self._request, position)
        had, aborted = len(part.token_ids), self._aborted.is_set()
        count = had + (length - had) // 2 if aborted else length
        spans = list(part.spans)
        if count > had:
            note_version(spans, had, self._version)
        oldest = min((version for _, version in spans), default=self._version)
        return GeneratedSample(
            group_id=part.group_id,
            sample_index=part.sample_index,
            token_ids=part.token_ids + token_ids[had:count],
            logprobs=part.logprobs + logprobs[had:count],
            finish_reason="abort" if aborted else "stop",
            weight_version=oldest,
            num_prompt_tokens=part.num_prompt_tokens,
            spec=pooled([part.spec, ROUNDS]) if count > had else part.spec,
            e2e_latency_s=part.e2e_latency_s,
            engine=self._engine,
            version_spans=reported_spans(spans, oldest),
        )


class FakeStaging:
    """Keeps the tensors of a push."""

    def __init__(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        self.expected = expected
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[name] = tensor.clone()

    def keep(self) -> None:
        pass  # ``add`` has copied every tensor

    def build(self) -> None:
        pass


class FakeWeights:
    """Implements ServingWeights for weights that nothing computes with; all of them are the target's."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec, self._version = spec, 0
        self.tensors: dict[str, torch.Tensor] = {}

    def version(self, side: Side) -> int:
        return self._version

    def staging(self, manifest: Manifest) -> FakeStaging:
        return FakeStaging(expected_shapes(self._spec))

    def commit(self, stage: PushStage[FakeStaging]) -> None:
        self.tensors, self._version = stage.staging.tensors, stage.manifest.version

    def checksum(self, side: Side) -> str:
        return combined_checksum((name, tensor_checksum(tensor)) for name, tensor in self.tensors.items())

    def pause(self, mode: PauseMode) -> None:
        """Do nothing: no sample is in progress, because each is made when the caller asks for it."""

    def resume(self) -> None:
        pass


class FakeEngine:
    """Implements RolloutEngine; the engine refuses the bucket ``fail_bucket`` of every push."""

    def __init__(
        self,
        config: Config,
        engine_index: int,
        transport: WeightTransport,
        site: Site = HERE,
        fail_bucket: int | None = None,
    ) -> None:
        self.config, self.site = config, site
        self._index, self._transport = engine_index, transport
        self._fail_bucket = fail_bucket
        self._resident = True

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors of the last push."""
        return self._weights.tensors

    def start(self) -> None:
        self._weights = FakeWeights(ModelSpec.from_folder(self.config.model.hf_checkpoint))
        self._pushes = PushDesk(self._index, self._transport, self._weights, getattr(torch, self.config.engine.dtype))

    def generate(self, request: GroupRequest) -> FakeGeneration:
        check_partials(request, TOKENS.stop)
        return FakeGeneration(request, self._index, self._weights.version("target"))

    def update_weights(self, message: PushMessage) -> PushReply:
        if isinstance(message, PushBucket) and message.index == self._fail_bucket:
            raise PushError(f"engine {self._index} refused bucket {message.index}, as it was told to")
        return self._pushes.answer(message)

    def set_resident(self, resident: bool) -> None:
        self._resident = resident

    def stats(self) -> EngineStats:
        return EngineStats(
            weight_version=self._weights.version("target"),
            num_running=0,
            num_waiting=0,
            kv_tokens_used=0,
            kv_tokens_capacity=self.config.engine.max_total_tokens or 0,
            resident=self._resident,
            rss_bytes=0,
        )

    def stop(self) -> None:
        self._resident = False
