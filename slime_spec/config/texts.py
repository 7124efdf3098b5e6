"""These parsers convert command line texts to typed values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal

from slime_spec.files import is_encodable, parse_json

SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
NULLS = ("null", "None")


def whole_number(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):  # int() would also take 1_000 and blanks
        raise ValueError(text)
    return int(text)


def suffixed_int(text: str) -> int:
    """Read SGLang's readable integers: 8192, 8k = 8000, 25.6k, 8Ki = 8192."""
    found = re.fullmatch(rf"([+-]?[0-9]+(?:\.[0-9]+)?)({'|'.join(SUFFIXES)})", text)
    if not found:
        raise ValueError(text)
    number = Decimal(found[1]) * SUFFIXES[found[2]]
    if number != int(number):
        raise ValueError(text)
    return int(number)


def finite_number(text: str) -> float:
    number = float(text) if text.isascii() and "_" not in text else math.nan
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def plain_json(text: str) -> object:
    """Read JSON; raises ValueError as ``parse_json`` and ``check_json`` do."""
    value = parse_json(text, "JSON")
    check_json(value)
    return value


def check_json(value: object) -> None:
    """Raise ValueError for plain data that JSON cannot carry: a number that is not finite, text that is not UTF-8."""
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


def is_text(value: str) -> bool:
    """Return whether files, terminals and command lines can hold ``value``."""
    return is_encodable(value) and "\0" not in value


def switch(text: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


# Each parser raises ValueError for a text that is not of its kind.
PARSERS: Mapping[str, Callable[[str], object]] = {
    "str": str,
    "int": whole_number,
    "suffixed_int": suffixed_int,
    "float": finite_number,
    "bool": switch,
    "json": plain_json,
}
EXPECTS = {
    "str": "text",
    "int": "a whole number",
    "suffixed_int": "a whole number such as 8192, 8k or 8Ki",
    "float": "a finite number",
    "bool": "true or false",
    "json": "JSON",
}
