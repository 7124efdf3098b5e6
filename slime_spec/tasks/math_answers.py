"""These rewards judge mathematical answers by the library math-verify, which compares them by value.

Its time limits are signals, which only a process's main thread gets: these rewards run in the processes of rewards.
"""

from __future__ import annotations

import logging
import re

from math_verify import parse, verify

from slime_spec.tasks.boxed import after_thinking, last_boxed
from slime_spec.types import Prompt

# It logs every answer that it cannot read or compare in time: such an answer is wrong, and the reward says so.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)

LIMIT_S = 5  # of reading an answer, and of comparing it with the label
LONGEST_ANSWER = 2_000  # characters; a longer one counts only where it is the label, letter by letter
LONGEST_REPLY = 20_000  # characters at the end of a reply that math_verify looks for an answer in
DAPO_LOOKS_AT = 300  # characters at the end of a reply
DAPO_ANSWER = re.compile(r"(?i)answer\s*:\s*([^\n]+)")
MINUS_SIGNS = str.maketrans("−﹣－", "---")
TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")
WORDS = re.compile(r"[A-Za-z][A-Za-z' -]+[A-Za-z]")
THOUSANDS = re.compile(r"(?<=\d)(?:\\[,!; ]|\{,\}|[\u00a0\u2009\u202f])(?=\d{3})")
# "18 dollars" is 18; "18 thousand" is not.
NUMBER_WITH_UNIT = re.compile(
    r"(-?\$?\d[\d,]*(?:\.\d+)?)\s+(?!(?:hundred|thousand|million|billion|trillion|dozen)s?\b)[A-Za-z][A-Za-z ]*\.?"
)


def math(prompt: Prompt, reply: str) -> float:
    """Return 1 if the reply's last \\boxed{} equals the label, else 0; a reply without a box earns 0, as in slime."""
    return float(_is_right(last_boxed(reply), prompt.answer))


def deepscaler(prompt: Prompt, reply: str) -> float:
    """Return 1 if the last \\boxed{} after the thinking equals the label, else 0, as in slime.

    A reply needs </think> or ###Response.
    """
    solution = after_thinking(reply)
    return float(solution is not None and _is_right(last_boxed(solution), prompt.answer))


def dapo(prompt: Prompt, reply: str) -> dict[str, object]:
    """Return the score 1 if the reply's last "Answer: X" equals the label, else -1, as in slime; ``acc`` says it too.

    Only the last 300 characters are looked at.
    """
    found = DAPO_ANSWER.findall(reply[-DAPO_LOOKS_AT:])
    given = found[-1].strip() if found else None
    if given is not None and "\\boxed" in given:
        given = last_boxed(given)
    is_right = _is_right(given, prompt.answer)
    return {"score": 1.0 if is_right else -1.0, "acc": is_right, "pred": given or ""}


def math_verify(prompt: Prompt, reply: str) -> float:
    """Return 1 if the answer that math-verify finds in the reply equals the label, else 0.

    It takes a \\boxed{} first, else the last formula or number.
    """
    boxed = last_boxed(reply)
    if boxed is not None:
        return float(_is_right(boxed, prompt.answer))
    given = parse(reply[-LONGEST_REPLY:].translate(MINUS_SIGNS), parsing_timeout=LIMIT_S)
    return float(bool(given) and verify(_parsed(_label(prompt.answer)), given, timeout_seconds=LIMIT_S))


def _is_right(given: str | None, label: str) -> bool:
    """Return whether an answer equals the label: as text, or by value."""
    if given is None or not label.strip():
        return False
    given, label = _tidied(given), _tidied(_label(label))
    if given == label:
        return True
    if not given or len(given) > LONGEST_ANSWER:
        return False
    if WORDS.fullmatch(label) and "\\" not in label:
        # math-verify would multiply the letters of a word: "east" would equal "seat".
        return given.casefold() == label.casefold()
    return bool(verify(_parsed(label), _parsed(given), timeout_seconds=LIMIT_S))


def _label(label: str) -> str:
    """Return the answer of a label, which may be a whole solution with a box."""
    boxed = last_boxed(label)
    return label if boxed is None else boxed


def _tidied(answer: str) -> str:
    """Leave out what is no part of the value: dollars and percents, a full stop, spaces in thousands, plain units."""
    plain = answer.translate(MINUS_SIGNS).strip().strip("$").strip().removesuffix(".")
    plain = THOUSANDS.sub("", plain.removesuffix("%").rstrip("\\ "))
    if (command := TEXT_COMMAND.fullmatch(plain)) is not None:
        plain = command[1].strip()
    with_unit = NUMBER_WITH_UNIT.fullmatch(plain)
    return plain if with_unit is None else with_unit[1]


def _parsed(answer: str) -> list[object]:
    parsed: list[object] = parse(f"\\boxed{{{answer}}}", parsing_timeout=LIMIT_S)
    return parsed
