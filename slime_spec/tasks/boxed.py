"""These functions find the answer in a reply: what its last \\boxed{} holds, what follows its thinking."""

from __future__ import annotations

import re
from collections import deque

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?=[^\s{]))")
END_OF_THINKING, RESPONSE = "</think>", "###Response"


def last_boxed(text: str) -> str | None:
    """Return what the last \\boxed{} of ``text`` holds, None where there is none or its brace is never closed.

    ``\\boxed 5`` without a brace holds what follows up to a space or a dollar sign.
    """
    opening = deque(BOX.finditer(text), maxlen=1)
    if not opening:
        return None
    opened = opening[0]
    if not opened[0].endswith("{"):
        return re.split(r"[\s$]", text[opened.end() :], maxsplit=1)[0]
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[opened.end() :], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)  # \{ and \} are braces of the answer
        if depth == 0:
            return text[opened.end() : opened.end() + brace.start()].strip()
    return None


def after_thinking(text: str) -> str | None:
    """Return what follows the last end of thinking, or the first response mark; None without either."""
    if END_OF_THINKING in text:
        return text.rpartition(END_OF_THINKING)[2]
    return text.partition(RESPONSE)[2] if RESPONSE in text else None
