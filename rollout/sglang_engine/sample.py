"""GrowingSample collects one sample while servers generate it, over as many parts as it takes.

A part is one request. It ends with the response, or breaks off with its server, or is aborted; the next part goes on
from the tokens that arrived, here or on another engine, as slime_spec.partial_samples says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rollout.sglang_engine.chunk import Chunk, optional_count
from rollout.sglang_engine.client import ProtocolError
from rollout.sglang_engine.returned_experts import ASKED, ReturnedExperts
from slime_spec.partial_samples import can_join_prompt, earlier_part, note_version, reported_spans, rounds_are_known
from slime_spec.routed_experts import RoutedExperts
from slime_spec.sglang.labels import engine_number, version_number
from slime_spec.sglang.metadata import spec_counters
from slime_spec.sglang.speculation_control import RequestSwitch
from slime_spec.speculation.counters import pooled
from slime_spec.types import FinishReason, GeneratedSample, GroupRequest, SamplingParams, SpecCounters, VersionSpan


@dataclass(frozen=True)
class Reading:
    """Says how an engine reads metadata: ``num_steps`` and ``fills_rounds`` for spec_counters, ``engine`` its number.

    ``eos_token_ids`` end a response whose params do not say ignore_eos; ``vocab_size`` bounds the ids of its tokens.
    ``off_switch`` is the field by which its requests ask not to speculate, None where they do. ``experts`` reads those
    that the server chose, None where nobody asks for them.
    """

    engine: int
    num_steps: int
    fills_rounds: bool
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    off_switch: RequestSwitch | None = None
    experts: ReturnedExperts | None = None


@dataclass
class Part:
    """Holds what one request with ``num_input`` tokens has brought, of ``max_new_tokens`` at most."""

    rid: str
    vocab_size: int
    max_new_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    meta_info: Mapping[str, Any] = field(default_factory=dict)
    num_input: int = 0
    reader: ReturnedExperts | None = None
    routed_experts: RoutedExperts | None = None

    def take(self, data: object) -> None:
        """Add one chunk; raises ProtocolError for a chunk that cannot be true, of which nothing is kept."""
        if self.ended:
            raise ProtocolError("a chunk came after the final one")
        had = len(self.token_ids)
        chunk = Chunk.read(data, self.rid, self.vocab_size, had)
        total = had + len(chunk.token_ids)
        if total > self.max_new_tokens and not chunk.is_abort:  # an abort may end beyond the budget
            raise ProtocolError(f"{total} tokens came where {self.max_new_tokens} were asked for")
        if self.reader is not None and chunk.meta_info.get("finish_reason") is not None:
            self.routed_experts = self.reader.read(chunk.meta_info, self.num_input + total - 1, chunk.is_abort)
        self.meta_info = chunk.meta_info
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        if chunk.spans:
            self.spans = chunk.spans  # until the final chunk comes with them, the version at each chunk counts
        elif total > had:
            note_version(self.spans, had, chunk.version)

    @property
    def ended(self) -> bool:
        return self.meta_info.get("finish_reason") is not None

    @property
    def abort(self) -> Mapping[str, Any] | None:
        """Return the finish reason of a request that was aborted; it may have a message and an HTTP status."""
        reason: Mapping[str, Any] = self.meta_info.get("finish_reason") or {}
        return reason if reason.get("type") == "abort" else None


class GrowingSample:
    """Collects the sample of one seed, from its first request to its finished response."""

    def __init__(self, request: GroupRequest, position: int, reading: Reading) -> None:
        self.request, self.index = request, request.sample_indices[position]
        self._seed = request.seeds[position]
        self._reading = reading
        self._engine = reading.engine
        self._can_resume = can_join_prompt(request.params)
        earlier = self._earlier = earlier_part(request, position, keeps_tokens=self._can_resume)
        self._token_ids, self._logprobs, self._spans = (
            list(earlier.token_ids),
            list(earlier.logprobs),
            list(earlier.spans),
        )
        self._counters, self._rounds_known = [earlier.spec], rounds_are_known(len(earlier.token_ids), earlier.spec)
        self._routed = earlier.routed_experts
        self._cached_tokens, self._num_retractions = earlier.cached_tokens, earlier.num_preemptions
        self.part = self._new_part("")

    @property
    def num_kept(self) -> int:
        """Return how many tokens the next part goes on from."""
        return len(self._token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids) + len(self.part.token_ids)

    def body(self, rid: str, extra_key: str) -> dict[str, Any]:
        """Return the next part's request; ``extra_key`` keeps prefixes of other weights from being reused."""
        self.part = self._new_part(rid)
        params = sampling_fields(self.request.params, len(self._token_ids), self._reading.eos_token_ids)
        body = {
            "rid": rid,
            "input_ids": [*self.request.prompt_token_ids, *self._token_ids],
            "sampling_params": {**params, "sampling_seed": self._seed},
            "return_logprob": True,
            "logprob_start_len": -1,
            "extra_key": extra_key,
        }
        if self._reading.experts is not None:
            body |= ASKED
        return body if self._reading.off_switch is None else self._reading.off_switch.put(body)

    def break_off(self) -> None:
        """End a part before its response ended; keep its tokens if another part can go on from them."""
        if self._can_resume:
            self._keep()
        else:
            self._token_ids, self._logprobs, self._spans, self._counters = [], [], [], []
            self._rounds_known, self._routed = True, None
        self.part = self._new_part("")

    @property
    def is_complete(self) -> bool:
        """Return whether the kept tokens are a whole response, which only lacks its finish reason."""
        return self._end()[0] != "abort"

    def finished(self, latency_s: float, draft_version: int | None) -> GeneratedSample:
        """Return the sample once its part has ended; between two parts it is one that was aborted, or is complete."""
        self._keep()
        reason: Mapping[str, Any] = self.part.meta_info.get("finish_reason") or {"type": "abort"}
        kind, matched = finish_kind(reason["type"]), reason.get("matched")
        if kind == "abort":
            kind, matched, num_tokens = self._end()
            self._cut(num_tokens)
        if len(self._logprobs) != len(self._token_ids):
            raise ProtocolError(f"{len(self._token_ids)} tokens with {len(self._logprobs)} logprobs")
        spec = replace(pooled(self._counters), num_steps=self._reading.num_steps)
        versions = [version for _, version in self._spans] or [
            version_number(self.part.meta_info.get("weight_version"))
        ]
        return GeneratedSample(
            group_id=self.request.group_id,
            sample_index=self.index,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            finish_reason=kind,
            weight_version=min(versions),
            num_prompt_tokens=len(self.request.prompt_token_ids),
            spec=spec if (spec.num_rounds or spec.num_off_steps) and self._rounds_known else SpecCounters(),
            e2e_latency_s=latency_s + self._earlier.e2e_latency_s,
            engine=self._engine,
            matched_stop=matched if kind == "stop" else None,
            cached_tokens=self._cached_tokens,
            version_spans=reported_spans(self._spans, min(versions)),
            draft_version=self._earlier.draft_version if self._earlier.token_ids else draft_version,
            lossy=self._earlier.lossy,
            num_preemptions=self._num_retractions,
            routed_experts=self._all_routed(),
        )

    def _end(self) -> tuple[FinishReason, int | None, int]:
        """Return how a response ends that was aborted, the token that matched, and how many tokens it has.

        SGLang ends an aborted request before it looks for stop tokens and at the budget: the last round's tokens may go
        on after the one that ends the response.
        """
        params, num_tokens = self.request.params, len(self._token_ids)
        ends = frozenset() if params.ignore_eos else self._reading.eos_token_ids.union(params.stop_token_ids)
        at = next((index for index, token in enumerate(self._token_ids) if token in ends), None)
        if at is not None and at < params.max_new_tokens:
            return "stop", self._token_ids[at], at + 1
        if num_tokens >= params.max_new_tokens:
            return "length", None, params.max_new_tokens
        return "abort", None, num_tokens

    def _new_part(self, rid: str) -> Part:
        num_input = len(self.request.prompt_token_ids) + len(self._token_ids)
        num_left = self.request.params.max_new_tokens - len(self._token_ids)
        return Part(rid, self._reading.vocab_size, num_left, num_input=num_input, reader=self._reading.experts)

    def _all_routed(self) -> RoutedExperts | None:
        """Return the experts of the sample's tokens but the last, as far as they came; a broken part brings none."""
        if self._reading.experts is None:
            return self._routed
        num_fed = len(self.request.prompt_token_ids) + len(self._token_ids) - 1
        return (self._routed or self._reading.experts.none()).first(num_fed)

    def _cut(self, num_tokens: int) -> None:
        del self._token_ids[num_tokens:], self._logprobs[num_tokens:]
        self._spans = [span for span in self._spans if span[0] < num_tokens]

    def _keep(self) -> None:
        part, start = self.part, len(self._token_ids)
        self._token_ids += part.token_ids
        self._logprobs += part.logprobs
        for first, version in part.spans:
            if first < len(part.token_ids):
                note_version(self._spans, start + first, version)
        number = engine_number(part.meta_info.get("weight_version"))
        self._engine = self._engine if number is None else number  # behind a router it may be another engine's server
        counters = SpecCounters()
        if part.ended:
            meta = part.meta_info
            counters = spec_counters(meta, self._reading.num_steps, self._reading.fills_rounds)
            if self._reading.off_switch is not None and not counters.num_rounds:
                counters = SpecCounters(num_off_steps=max(0, len(part.token_ids) - 1))
            self._cached_tokens += optional_count(meta, "cached_tokens")
            self._num_retractions += optional_count(meta, "num_retractions")
        if part.routed_experts is not None and self._token_ids:
            known = self._routed  # the first ones made the logprobs
            self._routed = part.routed_experts if known is None else known.completed(part.routed_experts)
        self._counters.append(counters)
        self._rounds_known &= rounds_are_known(len(part.token_ids), counters)


def sampling_fields(
    params: SamplingParams, num_generated: int, eos_token_ids: frozenset[int] = frozenset()
) -> dict[str, Any]:
    """Return SGLang's sampling_params for what is left after ``num_generated`` tokens.

    The EOS tokens are named: a server may run without a tokenizer, or with another generation_config.json.
    """
    fields: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens - num_generated,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "ignore_eos": params.ignore_eos,
    }
    if params.stop:
        fields["stop"] = list(params.stop)
    ends = {*params.stop_token_ids} if params.ignore_eos else eos_token_ids.union(params.stop_token_ids)
    if ends:
        fields["stop_token_ids"] = sorted(ends)
    for name, default in (("frequency_penalty", 0.0), ("presence_penalty", 0.0), ("repetition_penalty", 1.0)):
        if getattr(params, name) != default:
            fields[name] = getattr(params, name)
    if params.min_new_tokens > num_generated:
        fields["min_new_tokens"] = params.min_new_tokens - num_generated
    if params.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in params.logit_bias}
    return fields


def finish_kind(name: str) -> FinishReason:
    if name == "stop":
        return "stop"
    return "abort" if name == "abort" else "length"
