"""A sample keeps what the servers said of speculation in each of its answers, and gives it back as plain records.

slime's and miles' samples add up three numbers, under the oldest names, in ``spec_info``. Every answer of a server also
passes through ``sample.prefix_cache_info.add(meta_info=...)``, whichever function generates: there it is heard. Each
gets a mark there: a function that makes several samples of one copies what was heard, and an answer counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from slime_spec.algorithms import ALGORITHMS, Algorithm
from slime_spec.sglang.labels import version_number
from slime_spec.sglang.metadata import ROUNDS, plain_steps, spec_counters
from slime_spec.types import GeneratedSample, TurnCounts

KEPT = "slime_spec_answers"  # attribute of a sample; slime's to_dict and from_dict carry it
MARK = "slime_spec_mark"  # of an answer that was heard, the same in its copies
INFO = "prefix_cache_info"
ABORTED = "aborted"  # the status of a sample that goes on later, in slime and miles
PREFIX = "spec_"
KEYS = ("completion_tokens", "prompt_tokens", "cached_tokens", "weight_version", "draft_version", "lossy", "iter_count")
Answer = Mapping[str, Any]


class Hearing:
    """Stands in for a sample's ``prefix_cache_info`` while it is generated, and notes every answer added to it."""

    def __init__(self, info: Any) -> None:
        self.info = info
        self.answers: list[Answer] = []

    def add(self, meta_info: Mapping[str, Any]) -> None:
        self.info.add(meta_info=meta_info)
        self.answers.append({**kept(meta_info), MARK: uuid4().hex})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "info":  # a copy that has not been filled yet
            raise AttributeError(name)
        return getattr(self.info, name)


def kept(meta_info: Mapping[str, Any]) -> Answer:
    """Return what is kept of a response's metadata."""
    return {key: meta_info[key] for key in meta_info if key.startswith(PREFIX) or key in KEYS}


@contextmanager
def heard(sample: Any) -> Iterator[None]:
    """Note the answers that a sample gets in the block."""
    setattr(sample, INFO, Hearing(getattr(sample, INFO)))
    try:
        yield
    finally:
        settle(sample)


def settle(sample: Any) -> None:
    """Have a sample keep the answers that were heard, behind those of an earlier part of it.

    A function that makes several samples of one copies the one that it was given, and what was heard so far.
    """
    hearing = getattr(sample, INFO, None)
    if isinstance(hearing, Hearing):
        setattr(sample, INFO, hearing.info)
        setattr(sample, KEPT, [*getattr(sample, KEPT, ()), *hearing.answers])


def prompt_and_reply(sample: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the token ids of a sample's prompt and of its response; nothing before it is generated."""
    num_prompt = len(sample.tokens) - sample.response_length
    return tuple(sample.tokens[:num_prompt]), tuple(sample.tokens[num_prompt:])


def is_heard(sample: Any) -> bool:
    """Return whether the sample's answers were heard; else ``spec_info`` alone is known of it."""
    return hasattr(sample, KEPT)


def answers_of(sample: Any) -> list[Answer]:
    """Return a sample's answers; where none was heard, what the framework's own sums say, as one answer."""
    if is_heard(sample):
        return list(getattr(sample, KEPT))
    sums = sample.spec_info.to_dict()
    versions = getattr(sample, "weight_versions", None) or [None]
    return [{**sums, "completion_tokens": sums["completion_token_num"], "weight_version": versions[0]}]


def responses_of(samples: Iterable[Any], algorithm: Algorithm | None, num_steps: int = 0) -> list[GeneratedSample]:
    """Return each answer of the samples as a response, once where samples share it; see ``responses_from``."""
    counted: dict[object, Answer] = {}
    for answer in (answer for sample in samples for answer in answers_of(sample)):
        counted.setdefault(answer.get(MARK, len(counted)), answer)
    return responses_from(list(counted.values()), algorithm, num_steps)


def responses_from(answers: Sequence[Answer], algorithm: Algorithm | None, num_steps: int = 0) -> list[GeneratedSample]:
    """Return answers as responses, for the metrics of acceptance; tokens are counted, not kept.

    ``algorithm`` is the record of the servers', None where it is not known. Raises UnknownMetadataError for counters
    under names that nobody knows. Weight versions that are no numbers count as one version.
    """
    fills_rounds = algorithm is None or algorithm.fills_rounds
    versions = _versions([answer.get("weight_version") for answer in answers])
    return [
        _response(answer, version, num_steps, fills_rounds) for answer, version in zip(answers, versions, strict=True)
    ]


def _response(answer: Answer, version: int, num_steps: int, fills_rounds: bool) -> GeneratedSample:
    num_tokens = int(answer.get("completion_tokens") or 0)
    num_prompt_tokens = int(answer.get("prompt_tokens") or 0)
    draft_version = _versions([answer["draft_version"]])[0] if answer.get("draft_version") is not None else None
    num_plain = plain_steps(answer)
    return GeneratedSample(
        group_id="",
        sample_index=0,
        token_ids=(),
        logprobs=(),
        finish_reason="stop",
        weight_version=version,
        num_prompt_tokens=num_prompt_tokens,
        spec=spec_counters(answer, num_steps, fills_rounds, num_plain),
        cached_tokens=int(answer.get("cached_tokens") or 0),
        draft_version=draft_version,
        lossy=bool(answer.get("lossy")),
        turns=TurnCounts(1, num_tokens, num_tokens - num_plain, num_prompt_tokens),
    )


def _versions(labels: list[object]) -> list[int]:
    try:
        return [version_number(label if label is None else str(label)) for label in labels]
    except ValueError:
        return [0] * len(labels)


def algorithm_of(args: Any) -> Algorithm | None:
    """Return the record of the algorithm that a framework's servers run; None for none, and for one unknown here."""
    return algorithm_named(getattr(args, "sglang_speculative_algorithm", None))


def algorithm_named(name: object) -> Algorithm | None:
    """Return the record of an algorithm by its name here or SGLang's, in capitals or not, as SGLang takes it."""
    return None if name is None else next((each for each in ALGORITHMS.values() if _is_named(each, name)), None)


def _is_named(algorithm: Algorithm, name: object) -> bool:
    return str(name).upper() in (algorithm.name, algorithm.sglang)


def num_steps_of(args: Any) -> int:
    """Return a draft's depth where it is less than its tokens, those of a tree; else 0."""
    num_steps = getattr(args, "sglang_speculative_num_steps", None)
    topk = getattr(args, "sglang_speculative_eagle_topk", None)
    return num_steps if type(num_steps) is int and type(topk) is int and topk > 1 else 0


def num_rounds(answers: Iterable[Answer]) -> int:
    """Return the verify rounds of answers, under whatever other names their counters are."""
    return sum(int(answer.get(ROUNDS) or 0) for answer in answers)
