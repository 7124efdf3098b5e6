"""A draft is trained on sequences: a reply of the target with its prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from slime_spec.errors import ConfigError
from slime_spec.files import parse_json_object, shortened, text_lines

REMEDY = "Remove the line, or the file."


@dataclass(frozen=True)
class DraftSequence:
    """Holds a prompt and a reply; the loss is on the reply, the tokens from ``prompt_len`` on.

    ``kind`` groups sequences in held-out tables, e.g. "task greedy". Example::

        DraftSequence(index=3, token_ids=(1, 4093, 198, 20, 2), prompt_len=3, kind="task sampled")
    """

    index: int
    token_ids: tuple[int, ...]
    prompt_len: int
    kind: str

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.token_ids[: self.prompt_len]

    @property
    def reply(self) -> tuple[int, ...]:
        return self.token_ids[self.prompt_len :]


def is_held_out(prompt_token_ids: Sequence[int], percent: int) -> bool:
    """Return whether replies to this prompt are kept from training: no prompt is on both sides."""
    digest = xxhash.xxh3_64_intdigest(",".join(map(str, prompt_token_ids)).encode())
    return digest % 100 < percent


def split(
    sequences: Iterable[DraftSequence], held_out_percent: int
) -> tuple[tuple[DraftSequence, ...], tuple[DraftSequence, ...]]:
    """Return (training, held-out), each in order of ``index``, without sequences too short for a draft."""
    train: list[DraftSequence] = []
    held_out: list[DraftSequence] = []
    for sequence in sorted(sequences, key=lambda each: each.index):
        if len(sequence.reply) >= 2:
            (held_out if is_held_out(sequence.prompt, held_out_percent) else train).append(sequence)
    return tuple(train), tuple(held_out)


def as_line(sequence: DraftSequence) -> str:
    """Return the sequence as one line of a corpus file, without the newline."""
    return json.dumps(asdict(sequence))


def read_corpus(path: Path) -> Iterator[DraftSequence]:
    """Read the sequences of a corpus file; a last line that a kill cut short is left out.

    Raises ConfigError naming the file and the line that is broken.
    """
    for where, line in text_lines(path, remedy=REMEDY):
        if line.endswith("\n"):
            yield _sequence(parse_json_object(line, where, remedy=REMEDY), where)


def _sequence(row: Mapping[str, Any], where: str) -> DraftSequence:
    values: list[Any] = [row.get(name) for name in ("index", "token_ids", "prompt_len", "kind")]
    index, token_ids, prompt_len, kind = values
    if isinstance(token_ids, list) and all(map(_is_count, [index, prompt_len, *token_ids])) and isinstance(kind, str):
        sequence = DraftSequence(index, tuple(token_ids), prompt_len, kind)
        if prompt_len <= len(token_ids):
            return sequence
    rule = "must be a sequence: index, token_ids, prompt_len (at most their number) and kind"
    raise ConfigError(where, rule, shortened(str(row)), REMEDY)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
