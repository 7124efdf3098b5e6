"""The tokens that end a reply are named in three files; their union ends a reply in every engine, as in SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_spec.checkpoints.folder import AGAIN, CONFIG, CheckpointFolder
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.errors import CheckpointError

GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
KEY = "eos_token_id"
# Messages whose texts a template copies into the conversation as they are.
ASKED, REPLY, ASKED_NEXT = "Which number is it?", "It is number five.", "And the one after it?"


@dataclass(frozen=True)
class TurnEnd:
    """Says what a chat template writes behind a reply: ``TurnEnd("<|im_end|>\\n", (2, 198), {2: "<|im_end|>"}, True)``.

    ``special`` are the added tokens among ``token_ids``, by id. Where a turn has no closing token of its own,
    ``is_closed`` is False and the next user's turn is part of the text: GLM-4's ``<|user|>``.
    """

    text: str
    token_ids: tuple[int, ...]
    special: Mapping[int, str]
    is_closed: bool


@dataclass(frozen=True)
class ReplyEnds:
    """Holds the tokens of which each ends a reply, and how the chat template closes an assistant's turn."""

    token_ids: frozenset[int]
    turn: TurnEnd | None

    @classmethod
    def read(cls, folder: str) -> ReplyEnds | None:
        """Read a checkpoint folder; None for a folder without a tokenizer. Raises CheckpointError as its readers do."""
        if not CheckpointFolder(Path(folder)).has(TOKENIZER):
            end_token_ids(folder)  # for its errors
            return None
        tokenizer = Tokenizer.load(folder)
        return cls(end_token_ids(folder, tokenizer), turn_end(tokenizer))


def end_token_ids(folder: str | Path, tokenizer: Tokenizer | None = None) -> frozenset[int]:
    """Return the tokens of which each ends a reply: config.json's, generation_config.json's and the tokenizer's.

    The tokenizer is that of the folder, if it has one; ``tokenizer`` saves reading it again. Raises CheckpointError for
    an ``eos_token_id`` that is no token of the model.
    """
    stored = CheckpointFolder(Path(folder))
    size, generation = stored.config.get("vocab_size"), stored.path / GENERATION
    # A multimodal checkpoint may name other tokens at the top than for its language model: both end a reply.
    ids = {
        token for named in (stored.config, stored.json(CONFIG)) for token in _named(named, size, stored.path / CONFIG)
    }
    if stored.has(GENERATION):
        ids.update(_named(stored.json(GENERATION), size, generation))
    if tokenizer is None and stored.has(TOKENIZER):
        tokenizer = Tokenizer.load(folder)
    return frozenset(ids if tokenizer is None else ids | tokenizer.end_token_ids)


def turn_end(tokenizer: Tokenizer) -> TurnEnd | None:
    """Return how the chat template closes an assistant's turn.

    None without a template, and for a template that does not render a conversation or changes the texts in it.
    """
    turns = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": REPLY}]
    last = _behind_reply(tokenizer, turns)
    if last is not None and any(map(tokenizer.added_token, tokenizer.encode(last, special=False))):
        return _turn_end(tokenizer, last, is_closed=True)
    followed = _behind_reply(tokenizer, [*turns, {"role": "user", "content": ASKED_NEXT}])
    behind = last if followed is None else followed
    return None if behind is None else _turn_end(tokenizer, behind, is_closed=False)


def _behind_reply(tokenizer: Tokenizer, turns: list[dict[str, str]]) -> str | None:
    text = tokenizer.rendered(turns)
    return text.rpartition(REPLY)[2].partition(ASKED_NEXT)[0] if text is not None and REPLY in text else None


def _turn_end(tokenizer: Tokenizer, text: str, is_closed: bool) -> TurnEnd:
    ids = tokenizer.encode(text, special=False)
    named = {each: name for each in ids if (name := tokenizer.added_token(each)) is not None}
    return TurnEnd(text, ids, named, is_closed)


def _named(values: Mapping[str, Any], size: object, path: Path) -> tuple[int, ...]:
    """Return the ids that a file names (null, a number or a list), each below ``size`` where that is a number."""
    named = values.get(KEY)
    ids = named if isinstance(named, list) else [] if named is None else [named]
    for each in ids:
        if type(each) is not int or each < 0 or (type(size) is int and each >= size):
            below = f" below the vocabulary size {size}" if type(size) is int else ""
            rule = f"must be a token id, or a list of token ids: whole numbers from 0{below}"
            raise CheckpointError(f"{path}: {KEY}", rule, each, AGAIN)
    return tuple(ids)
