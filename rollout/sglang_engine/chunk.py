"""A Chunk is one piece of a streamed response, checked: what a server says is not believed where it cannot be true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.sglang_engine.client import ProtocolError
from slime_spec.partial_samples import LOGPROB_ERROR
from slime_spec.sglang.labels import UNNAMED, version_number
from slime_spec.sglang.metadata import ROUNDS, generation_of
from slime_spec.types import VersionSpan

# SGLang reports a token of probability 0 with the least number of float32.
LEAST_LOGPROB = -1e30


@dataclass(frozen=True)
class Chunk:
    """Holds the tokens that one chunk adds to its request, their logprobs, and the request's metadata.

    Every token is of the vocabulary and has its own logprob, which is finite; the final chunk's counts fit each other.
    ``version`` are the weights that the server had when it sent the chunk.
    """

    token_ids: list[int]
    logprobs: list[float]
    version: int
    spans: list[VersionSpan]
    meta_info: Mapping[str, Any]
    is_abort: bool

    @classmethod
    def read(cls, data: object, rid: str, vocab_size: int, had: int) -> Chunk:
        """Check the JSON of a chunk of request ``rid``, after ``had`` tokens; raises ProtocolError.

        A chunk has all tokens so far, or only new ones: its counts show which. A chunk that aborts its request may have
        other numbers than had arrived: it then adds nothing.
        """
        meta = data.get("meta_info") if isinstance(data, Mapping) else None
        if not isinstance(data, Mapping) or not isinstance(meta, Mapping):
            raise ProtocolError(f"a chunk without meta_info: {str(data)[:200]}")
        if meta.get("id", rid) != rid:
            raise ProtocolError(f"a chunk of request {meta['id']!r} came in the stream of {rid}")
        if not isinstance(label := meta.get("weight_version", UNNAMED), str):
            raise ProtocolError(f"weight_version is {label!r}")
        version = _version(label)
        is_abort = _is_abort(meta)
        ids = _list(data, "output_ids", is_optional=is_abort)
        triples = _list(meta, "output_token_logprobs", is_optional=is_abort or not ids)
        num_total = None if is_abort and meta.get("completion_tokens") is None else count(meta, "completion_tokens")
        if len(ids) == len(triples) and len(ids) == num_total and had <= num_total:
            ids, triples = ids[had:], triples[had:]
        elif len(ids) != len(triples) or had + len(ids) != num_total:
            if not is_abort:
                raise ProtocolError(f"{len(ids)} tokens and {len(triples)} logprobs make {num_total} after {had}")
            ids = triples = []
        _check_tokens(ids, triples, vocab_size)
        if meta.get("finish_reason") is not None:
            _check_counters(meta)
        return cls(ids, [triple[0] for triple in triples], version, _spans(meta), meta, is_abort)


def count(meta: Mapping[str, Any], name: str) -> int:
    """Return a count of the metadata; raises ProtocolError where there is none."""
    value = meta.get(name)
    if type(value) is not int or value < 0:
        raise ProtocolError(f"{name} is {value!r}")
    return value


def optional_count(meta: Mapping[str, Any], name: str) -> int:
    """Return a count that not every release reports: 0 where it is absent."""
    return 0 if meta.get(name) is None else count(meta, name)


def _list(data: Mapping[str, Any], name: str, is_optional: bool) -> list[Any]:
    found = data.get(name)
    if isinstance(found, list):
        return found
    if found is None and is_optional:
        return []
    raise ProtocolError(f"{name} is {str(found)[:200]!r}")


def _is_abort(meta: Mapping[str, Any]) -> bool:
    reason = meta.get("finish_reason")
    if reason is None:
        return False
    if not (isinstance(reason, Mapping) and isinstance(reason.get("type"), str)):
        raise ProtocolError(f"finish_reason is {reason!r}")
    return bool(reason["type"] == "abort")


def _check_tokens(ids: Sequence[Any], triples: Sequence[Any], vocab_size: int) -> None:
    for token, triple in zip(ids, triples, strict=True):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ProtocolError(f"token {token!r} is not of the vocabulary, which has {vocab_size}")
        if not isinstance(triple, list) or len(triple) < 2 or triple[1] != token:
            raise ProtocolError(f"token {token} came with the logprob of another: {triple!r}")
        logprob = triple[0]
        if not (type(logprob) in (int, float) and LEAST_LOGPROB < logprob <= LOGPROB_ERROR):
            raise ProtocolError(f"token {token} has the logprob {logprob!r}")


def _check_counters(meta: Mapping[str, Any]) -> None:
    if ROUNDS not in meta:
        return
    num_rounds, generation = count(meta, ROUNDS), generation_of(meta)
    if generation is None:
        return
    num_correct, num_proposed = count(meta, generation.correct), count(meta, generation.proposed)
    histogram = meta.get(generation.histogram) or []
    if not isinstance(histogram, list) or not all(type(each) is int and each >= 0 for each in histogram):
        raise ProtocolError(f"{generation.histogram} is {histogram!r}")
    num_binned = sum(accepted * rounds for accepted, rounds in enumerate(histogram))
    if num_correct > num_proposed or num_binned > num_correct or sum(histogram) > num_rounds:
        raise ProtocolError(
            f"{num_rounds} rounds with {num_proposed} proposed and {num_correct} accepted drafts contradict their "
            f"histogram {histogram}"
        )


def _version(label: object) -> int:
    try:
        return version_number(label)
    except ValueError as error:
        raise ProtocolError(str(error)) from None


def _spans(meta: Mapping[str, Any]) -> list[VersionSpan]:
    """Return the version spans that a final chunk reports; none where it reports none."""
    reported = meta.get("weight_versions") or []
    try:
        return [(count(span, "start"), _version(span["version"])) for span in reported]
    except (TypeError, AttributeError, KeyError):
        raise ProtocolError(f"weight_versions are {str(reported)[:200]}") from None
