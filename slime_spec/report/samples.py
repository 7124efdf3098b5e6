"""This module reads a few samples of a run's first and last step from samples.jsonl, whose middle it never reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from slime_spec.errors import ConfigError
from slime_spec.files import parse_json_object
from slime_spec.sglang.metadata import ROUNDS

NUM_PROMPTS = 6  # of each of both steps
MAX_LETTERS = 3_000  # of a prompt or a reply that a page shows
MOST_READ_BYTES = 64 << 20  # of either end of the file, where one step has more samples than a page can use
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class ShownSample:
    """Holds what a page shows of one sample; ``accept_length`` is None without a verify round."""

    step: int
    prompt: str
    reply: str
    answer: str
    reward: float | None
    error: str
    num_tokens: int | None
    accept_length: float | None


def ends_of_samples(path: Path) -> tuple[tuple[ShownSample, ...], ...]:
    """Return a sample of each of a few prompts, of the first and of the last step: two lists, one for a single step.

    A line that is no sample, or not finished yet, is left out. Empty where there is no file.
    """
    try:
        with path.open("rb") as file:
            first = _one_per_prompt(_of_one_step(_rows(_forwards(file))))
            last = _one_per_prompt(_of_one_step(_rows(_backwards(file)))[::-1])
    except FileNotFoundError:
        return ()
    steps = {each[0].step: each for each in (first, last) if each}
    return tuple(steps.values())


def shortened_middle(text: str, length: int = MAX_LETTERS) -> str:
    """Return ``text``, or its two ends with the number of letters left out between them."""
    if len(text) <= length:
        return text
    half = length // 2
    return f"{text[:half]}\n[{len(text) - 2 * half:,} characters left out]\n{text[-half:]}"


def _of_one_step(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows up to the first of another step."""
    found: list[dict[str, Any]] = []
    for row in rows:
        if found and row["rollout_id"] != found[0]["rollout_id"]:
            break
        found.append(row)
    return found


def _one_per_prompt(rows: Sequence[dict[str, Any]]) -> tuple[ShownSample, ...]:
    by_prompt = {repr(row.get("prompt_id")): row for row in reversed(rows)}
    return tuple(_shown(row) for row in list(by_prompt.values())[::-1][:NUM_PROMPTS])


def _shown(row: dict[str, Any]) -> ShownSample:
    meta = row.get("meta_info")
    meta = meta if isinstance(meta, dict) else {}
    accepted = _number(meta.get("spec_accept_length")) if meta.get(ROUNDS) else None
    tokens = meta.get("completion_tokens")
    return ShownSample(
        step=row["rollout_id"],
        prompt=shortened_middle(str(row.get("prompt", ""))),
        reply=shortened_middle(str(row.get("reply", ""))),
        answer=shortened_middle(str(row.get("answer", ""))),
        reward=_number(row.get("reward")),
        error=shortened_middle(str(row.get("error", ""))),
        num_tokens=tokens if type(tokens) is int else None,
        accept_length=accepted,
    )


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None


def _rows(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row = parse_json_object(line.decode(), "a sample")
        except (ConfigError, UnicodeDecodeError):  # nothing is counted of the samples that are shown
            continue
        if type(row.get("rollout_id")) is int:
            yield row


def _forwards(file: BinaryIO) -> Iterator[bytes]:
    """Yield the file's whole lines from its beginning."""
    num_read = 0
    for line in file:
        num_read += len(line)
        if not line.endswith(b"\n") or num_read > MOST_READ_BYTES:
            return
        yield line


def _backwards(file: BinaryIO) -> Iterator[bytes]:
    """Yield the file's whole lines from its end, the last one first; an unfinished last line is left out."""
    end = size = file.seek(0, os.SEEK_END)
    tail = None  # the beginning of a line that a later block ends; None until the last newline is found
    while end and size - end < MOST_READ_BYTES:
        start = max(0, end - BLOCK_BYTES)
        file.seek(start)
        block = file.read(end - start)
        end = start
        parts = (block + (tail or b"")).split(b"\n")
        if tail is None:
            if len(parts) == 1:
                continue
            parts.pop()  # what follows the last newline
        tail = parts[0]
        yield from reversed(parts[1:])
    if end == 0 and tail is not None:
        yield tail
