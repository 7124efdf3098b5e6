"""GrowingSample collects one sample while servers generate it, over as many parts as it takes.

A part is one request. It ends with the response, or breaks off with its server, or is aborted; the next part goes on
from the tokens that arrived, here or on another engine, as slime_spec.partial_samples says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from slime_spec.partial_samples import can_join_prompt, earlier_part, note_version, reported_spans, rounds_are_known
from slime_spec.sglang.labels import engine_number, version_number
from slime_spec.sglang.metadata import spec_counters
from slime_spec.speculation.counters import pooled
from slime_spec.types import FinishReason, GeneratedSample, GroupRequest, SamplingParams, SpecCounters, VersionSpan


class ProtocolError(RuntimeError):
    """The parts of a response contradict each other."""


@dataclass(frozen=True)
class Reading:
    """Says how an engine reads metadata: ``num_steps`` and ``fills_rounds`` for spec_counters, ``engine`` its number.

    ``eos_token_ids`` end a response whose params do not say ignore_eos.
    """

    engine: int
    num_steps: int
    fills_rounds: bool
    eos_token_ids: frozenset[int] = frozenset()


@dataclass
class Part:
    """Holds what one request has brought. A chunk has all tokens so far, or only new ones: its counts show which."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    meta_info: Mapping[str, Any] = field(default_factory=dict)

    def take(self, chunk: Mapping[str, Any]) -> None:
        """Add one chunk; raises ProtocolError when its counts fit neither kind."""
        meta = chunk["meta_info"]
        ids = chunk["output_ids"]
        triples = meta.get("output_token_logprobs") or []
        total, had = int(meta.get("completion_tokens", len(ids))), len(self.token_ids)
        self.meta_info = meta
        if had + len(ids) == total and len(ids) == len(triples):
            self.token_ids += ids
            self.logprobs += [logprob for logprob, *_ in triples]
        elif len(ids) == total and len(ids) == len(triples):
            self.token_ids, self.logprobs = list(ids), [logprob for logprob, *_ in triples]
        elif not _is_abort(meta):  # an abort may be reported with fewer tokens than had arrived
            raise ProtocolError(f"{len(ids)} tokens and {len(triples)} logprobs make {total} after {had}: {meta}")
        self._note_version(had)

    @property
    def ended(self) -> bool:
        return self.meta_info.get("finish_reason") is not None

    def _note_version(self, had: int) -> None:
        """Take the versions from the final chunk's spans; until it comes, from the version at each chunk."""
        if reported := self.meta_info.get("weight_versions"):
            self.spans = [(int(span["start"]), version_number(span["version"])) for span in reported]
            return
        version = version_number(self.meta_info.get("weight_version"))
        if len(self.token_ids) > had:
            note_version(self.spans, had, version)


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
        self._cached_tokens, self._num_retractions = earlier.cached_tokens, earlier.num_preemptions
        self.part = Part()

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids) + len(self.part.token_ids)

    def body(self, rid: str, extra_key: str) -> dict[str, Any]:
        """Return the next part's request; ``extra_key`` keeps prefixes of other weights from being reused."""
        self.part = Part()
        params = sampling_fields(self.request.params, len(self._token_ids), self._reading.eos_token_ids)
        return {
            "rid": rid,
            "input_ids": [*self.request.prompt_token_ids, *self._token_ids],
            "sampling_params": {**params, "sampling_seed": self._seed},
            "return_logprob": True,
            "logprob_start_len": -1,
            "extra_key": extra_key,
        }

    def break_off(self) -> None:
        """End the part of a server that is gone; keep its tokens if another server can resume the sample."""
        if self._can_resume:
            self._keep()
        else:
            self._token_ids, self._logprobs, self._spans, self._counters = [], [], [], []
            self._rounds_known = True
        self.part = Part()

    @property
    def is_complete(self) -> bool:
        """Return whether the kept tokens are a whole response, which only lacks its finish reason."""
        return len(self._token_ids) >= self.request.params.max_new_tokens

    def finished(self, latency_s: float, draft_version: int | None, aborted: bool = False) -> GeneratedSample:
        """Return the sample, once its part has ended (or ``aborted`` between two parts)."""
        self._keep()
        reason: Mapping[str, Any] = self.part.meta_info.get("finish_reason") or {}
        kind: FinishReason = "abort" if aborted else finish_kind(reason.get("type", "length"))
        matched = reason.get("matched") if kind == "stop" else None
        if kind == "abort":
            kind, matched = self._end_of_aborted()
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
            spec=spec if spec.num_rounds and self._rounds_known else SpecCounters(),
            e2e_latency_s=latency_s + self._earlier.e2e_latency_s,
            engine=self._engine,
            matched_stop=matched,
            cached_tokens=self._cached_tokens,
            version_spans=reported_spans(self._spans, min(versions)),
            draft_version=self._earlier.draft_version if self._earlier.token_ids else draft_version,
            lossy=self._earlier.lossy,
            num_preemptions=self._num_retractions,
        )

    def _end_of_aborted(self) -> tuple[FinishReason, int | None]:
        """Return how an aborted response ends, and cut what is beyond its end.

        SGLang ends an aborted request before it looks for stop tokens and at the budget: the last round's tokens may go
        on after the one that ends the response.
        """
        params = self.request.params
        ends = frozenset() if params.ignore_eos else self._reading.eos_token_ids.union(params.stop_token_ids)
        at = next((index for index, token in enumerate(self._token_ids) if token in ends), None)
        if at is not None and at < params.max_new_tokens:
            self._cut(at + 1)
            return "stop", self._token_ids[at]
        if self.is_complete:
            self._cut(params.max_new_tokens)
            return "length", None
        return "abort", None

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
            self._cached_tokens += int(meta.get("cached_tokens") or 0)
            self._num_retractions += int(meta.get("num_retractions") or 0)
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


def _is_abort(meta: Mapping[str, Any]) -> bool:
    return (meta.get("finish_reason") or {}).get("type") == "abort"
