"""One sample while a server generates it: what has arrived, over as many parts as it took.

A part is one request. It ends with the response, or breaks off with its server; the next part goes on from the tokens
that arrived, where that gives the same law, and starts anew where it would not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from slime_spec.speculation.metadata import pooled, spec_counters
from slime_spec.types import FinishReason, GeneratedSample, GroupRequest, SamplingParams, SpecCounters

Span = tuple[int, int]
"""(first token index, weight version)"""


class ProtocolError(RuntimeError):
    """A response whose parts contradict each other."""


@dataclass(frozen=True)
class Reading:
    """How an engine reads metadata: ``num_steps`` and ``fills_rounds`` are spec_counters', ``engine`` is its number."""

    engine: int
    num_steps: int
    fills_rounds: bool


@dataclass
class Part:
    """What one request has brought. SGLang's chunks hold all so far, or only what is new: their counts tell which."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    meta_info: Mapping[str, Any] = field(default_factory=dict)

    def take(self, chunk: Mapping[str, Any]) -> None:
        """Add one chunk; raises ProtocolError when its counts fit neither way."""
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
        elif not _is_abort(meta):  # an abort may be told in fewer words than the tokens that had arrived
            raise ProtocolError(f"{len(ids)} tokens and {len(triples)} logprobs make {total} after {had}: {meta}")
        self._note_version(had)

    @property
    def ended(self) -> bool:
        return self.meta_info.get("finish_reason") is not None

    def _note_version(self, had: int) -> None:
        """From the spans of the final chunk; until it comes, from the version at each chunk."""
        if told := self.meta_info.get("weight_versions"):
            self.spans = [(int(span["start"]), version_number(span["version"])) for span in told]
            return
        version = version_number(self.meta_info.get("weight_version"))
        if len(self.token_ids) > had and (not self.spans or self.spans[-1][1] != version):
            self.spans.append((had, version))


class GrowingSample:
    """Sample ``index`` of a group, from its first request to its finished response."""

    def __init__(self, request: GroupRequest, index: int, reading: Reading) -> None:
        self.request, self.index = request, index
        self._reading = reading
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._spans: list[Span] = []
        self._counters: list[SpecCounters] = []
        self._cached_tokens = self._num_retractions = 0
        self._broke = False
        self.part = Part()

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids) + len(self.part.token_ids)

    def body(self, rid: str, extra_key: str) -> dict[str, Any]:
        """The request for the next part. ``extra_key`` keeps prefixes computed with other weights from being reused."""
        self.part = Part()
        params = sampling_fields(self.request.params, len(self._token_ids))
        return {
            "rid": rid,
            "input_ids": [*self.request.prompt_token_ids, *self._token_ids],
            "sampling_params": {**params, "sampling_seed": self.request.seeds[self.index]},
            "return_logprob": True,
            "logprob_start_len": -1,
            "extra_key": extra_key,
        }

    def break_off(self) -> None:
        """The server of this part is gone: keep what it brought if another can go on from it."""
        if can_go_on(self.request.params):
            self._keep()
        else:
            self._token_ids, self._logprobs, self._spans, self._counters = [], [], [], []
        # The rounds of a part that broke off are unknown, and tokens without their rounds would look like speed.
        self._broke = True
        self.part = Part()

    @property
    def is_complete(self) -> bool:
        """Whether what was kept is a whole response, of which only the ending is missing."""
        return len(self._token_ids) >= self.request.params.max_new_tokens

    def finished(self, latency_s: float, draft_version: int | None, aborted: bool = False) -> GeneratedSample:
        """The sample, once its part has ended (or ``aborted`` between two parts)."""
        self._keep()
        reason: Mapping[str, Any] = self.part.meta_info.get("finish_reason") or {}
        kind: FinishReason = "abort" if aborted else finish_kind(reason.get("type", "length"))
        if len(self._logprobs) != len(self._token_ids):
            raise ProtocolError(f"{len(self._token_ids)} tokens with {len(self._logprobs)} logprobs")
        spec = SpecCounters() if self._broke else replace(pooled(self._counters), num_steps=self._reading.num_steps)
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
            spec=spec if spec.num_rounds else SpecCounters(),
            e2e_latency_s=latency_s,
            engine=self._reading.engine,
            matched_stop=reason.get("matched") if kind == "stop" else None,
            cached_tokens=self._cached_tokens,
            version_spans=tuple(self._spans) if len(set(versions)) > 1 else (),
            draft_version=draft_version,
            num_preemptions=self._num_retractions,
        )

    def _keep(self) -> None:
        part, start = self.part, len(self._token_ids)
        self._token_ids += part.token_ids
        self._logprobs += part.logprobs
        for first, version in part.spans:
            if first < len(part.token_ids) and (not self._spans or self._spans[-1][1] != version):
                self._spans.append((start + first, version))
        if part.ended:
            meta = part.meta_info
            self._counters.append(spec_counters(meta, self._reading.num_steps, self._reading.fills_rounds))
            self._cached_tokens += int(meta.get("cached_tokens") or 0)
            self._num_retractions += int(meta.get("num_retractions") or 0)


def sampling_fields(params: SamplingParams, num_generated: int) -> dict[str, Any]:
    """SGLang's sampling_params for what is left after ``num_generated`` tokens."""
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
    if params.stop_token_ids:
        fields["stop_token_ids"] = list(params.stop_token_ids)
    for name, default in (("frequency_penalty", 0.0), ("presence_penalty", 0.0), ("repetition_penalty", 1.0)):
        if getattr(params, name) != default:
            fields[name] = getattr(params, name)
    if params.min_new_tokens > num_generated:
        fields["min_new_tokens"] = params.min_new_tokens - num_generated
    if params.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in params.logit_bias}
    return fields


def can_go_on(params: SamplingParams) -> bool:
    """Whether generated tokens may become part of the prompt without bending the law of the rest.

    Stop strings may begin before the seam, and penalties of generated tokens do not count the prompt's.
    """
    return not params.stop and params.frequency_penalty == params.presence_penalty == 0.0


def finish_kind(name: str) -> FinishReason:
    if name == "stop":
        return "stop"
    return "abort" if name == "abort" else "length"


def version_number(text: object) -> int:
    """Our versions are whole numbers; a server that was never pushed to may call its own anything."""
    return int(text) if isinstance(text, str) and text.isdigit() else 0


def _is_abort(meta: Mapping[str, Any]) -> bool:
    return (meta.get("finish_reason") or {}).get("type") == "abort"
