"""The reward gpqa judges the letter that a reply chooses among a question's choices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from slime_spec.tasks.boxed import last_boxed
from slime_spec.types import Prompt

DEFAULT_LETTERS = ascii_uppercase[:10]
NAMED = re.compile(r"\b(?:answer|option|choice)\b[\s:*]*(?:is\b[\s:*]*)?[(\[]?([A-Z])\b", re.IGNORECASE)
CALLED_CORRECT = re.compile(r"\b([A-Z])\b[)\]*]*\s+is\s+(?:the\s+)?correct\b", re.IGNORECASE)
ALONE = re.compile(r"(?<![\w'])([A-Z])(?![\w'])")


def gpqa(prompt: Prompt, reply: str) -> float:
    """Return 1 if the reply's last answer is the right choice, by its letter or by its text, else 0.

    The right letter is ``metadata.correct_letter``, a label that is a letter, a number that counts from 0, or the text
    of one of ``metadata.choices``; ``metadata.valid_letters`` are the letters there are (by default A to J).
    """
    text = reply.rpartition("</think>")[2]
    choices = _choices(prompt.metadata)
    letters = _letters(prompt.metadata, choices)
    right = _right_letter(prompt, choices, letters)
    given = _given_letter(text, letters)
    if given is not None and right is not None:
        return float(given == right)
    text_of_right = choices[letters.index(right)] if right is not None and letters.index(right) < len(choices) else ""
    label_text = "" if prompt.answer.strip().upper() == right else prompt.answer
    wanted = _plain(text_of_right or label_text)
    return float(bool(wanted) and f" {wanted} " in f" {_plain(text)} ")


def _choices(metadata: Mapping[str, Any]) -> list[str]:
    choices = metadata.get("choices") or []
    return [str(each) for each in (choices.values() if isinstance(choices, Mapping) else choices)]


def _letters(metadata: Mapping[str, Any], choices: Sequence[str]) -> list[str]:
    letters = metadata.get("valid_letters") or ascii_uppercase[: len(choices)] or DEFAULT_LETTERS
    return [str(letter).upper() for letter in letters]


def _right_letter(prompt: Prompt, choices: Sequence[str], letters: Sequence[str]) -> str | None:
    label = prompt.label if prompt.label is not None else prompt.answer
    named = str(prompt.metadata.get("correct_letter") or label).strip().upper()
    if named in letters:
        return named
    if type(label) is int and 0 <= label < len(letters):
        return letters[label]
    same = [letter for letter, choice in zip(letters, choices, strict=False) if _plain(choice) == _plain(str(label))]
    return same[0] if same else None


def _given_letter(text: str, letters: Sequence[str]) -> str | None:
    """Return the letter in the last box, else the last that is called the answer, else the last that stands alone."""
    boxed = last_boxed(text)
    if boxed is not None and (found := re.sub(r"\\text\w*|[^A-Za-z]", "", boxed).upper()) in letters:
        return found
    for pattern in (NAMED, CALLED_CORRECT, ALONE):
        found_letters = [letter.upper() for letter in pattern.findall(text) if letter.upper() in letters]
        if found_letters:
            return found_letters[-1]
    return None


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()
