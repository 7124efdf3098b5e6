"""A corpus may be a file of conversations, as SpecForge has them: every reply of an assistant in it is a sequence.

    {"id": "7", "conversations": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}

ShareGPT's spelling is read too: {"from": "human", "value": ...}, {"from": "gpt", "value": ...}.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.draft.training.sequence import DraftSequence
from slime_spec.errors import CheckpointError, ConfigError
from slime_spec.files import json_rows, shortened

logger = logging.getLogger(__name__)

FLAG, KEY, KIND = "--conversations", "conversations", "conversation"
ROLES = {"human": "user", "gpt": "assistant"}
MEND = 'Write {"conversations": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.'


def read_conversations(path: Path, tokenizer: Tokenizer, max_tokens: int) -> list[DraftSequence]:
    """Return a sequence for every reply in the file, cut after ``max_tokens``, those before it in its prompt.

    Replies whose prompts leave no room for two tokens are left out, with a warning that says how many. Raises
    ConfigError naming the file and the line that is broken, and for a file without a reply.
    """
    sequences: list[DraftSequence] = []
    num_left_out = 0
    for place, row in json_rows(path):
        turns = _turns(place, row)
        for prompt, reply in _replies(place, turns, tokenizer):
            ids = (*prompt, *reply)[:max_tokens]
            if len(ids) < len(prompt) + 2:
                num_left_out += 1
                continue
            sequences.append(DraftSequence(len(sequences), ids, len(prompt), KIND))
    if num_left_out:
        logger.warning("left out replies without room for two tokens file=%s replies=%d", path, num_left_out)
    if not sequences:
        rule = f"must hold a reply of an assistant that fits into {max_tokens} tokens"
        raise ConfigError(FLAG, rule, str(path), MEND)
    return sequences


def _turns(place: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = row.get(KEY)
    if not isinstance(turns, list) or not turns:
        raise ConfigError(FLAG, f"{place}: must have a list of messages under {KEY!r}", shortened(str(row)), MEND)
    return [_turn(place, turn) for turn in turns]


def _turn(place: str, turn: Any) -> dict[str, Any]:
    values = turn if isinstance(turn, Mapping) else {}
    role = values.get("role", values.get("from"))
    content = values.get("content", values.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise ConfigError(FLAG, f"{place}: a message must have a role and a text", shortened(str(turn)), MEND)
    rest = {key: value for key, value in values.items() if key not in ("role", "from", "content", "value")}
    return {**rest, "role": ROLES.get(role, role), "content": content}


def _replies(
    place: str, turns: list[dict[str, Any]], tokenizer: Tokenizer
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the token ids of each reply's prompt and of the reply, as a rollout would have them."""
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant" or number == 0:
            continue
        try:
            before = tokenizer.chat_text(turns[:number])
        except CheckpointError as error:
            raise ConfigError(FLAG, f"{place}: {error.rule}", number, "Write messages that it takes.") from None
        yield tokenizer.encode(before, special=False), _reply_ids(before, turns[: number + 1], tokenizer)


def _reply_ids(before: str, turns: list[dict[str, Any]], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the reply's ids up to the token that ends it.

    The template may change what an assistant said (it may cut its thoughts): then the text itself is the reply.
    """
    whole = tokenizer.rendered(turns) or ""
    text = whole.removeprefix(before) if whole.startswith(before) else turns[-1]["content"]
    ids = tokenizer.encode(text, special=False)
    ends = [place for place, token_id in enumerate(ids) if token_id in tokenizer.end_token_ids]
    if ends:
        return ids[: ends[0] + 1]
    return ids if tokenizer.eos_token_id is None else (*ids, tokenizer.eos_token_id)
