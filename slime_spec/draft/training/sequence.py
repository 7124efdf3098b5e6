"""A draft is trained on sequences: a reply of the target with its prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from slime_spec.errors import ConfigError


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
            prompt = sequence.token_ids[: sequence.prompt_len]
            (held_out if is_held_out(prompt, held_out_percent) else train).append(sequence)
    return tuple(train), tuple(held_out)


def write_line(sequence: DraftSequence) -> str:
    """Return the sequence as one line of a corpus file."""
    return json.dumps(asdict(sequence)) + "\n"


def read_corpus(path: Path) -> Iterator[DraftSequence]:
    """Read the sequences of a corpus file; a last line that a kill cut short is left out.

    Raises ConfigError naming the file and the line that is broken.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # the text after the last newline is empty or cut short
        try:
            row = json.loads(line)
            yield DraftSequence(int(row["index"]), tuple(row["token_ids"]), int(row["prompt_len"]), str(row["kind"]))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                "corpus", f"{path}:{number} must be a sequence: {error!r}", line[:80], "Remove the line, or the file."
            ) from None
