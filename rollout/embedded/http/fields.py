"""JSON from a client, read field by field: every complaint is a ConfigError that names the field."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from slime_spec.config.suggest import did_you_mean
from slime_spec.errors import ConfigError

Choice = TypeVar("Choice", bound=str)
LONGEST_SHOWN = 80  # characters of a bad value that an error repeats


def bad_field(name: str, rule: str, value: object, remedy: str) -> ConfigError:
    """A ConfigError that does not send a whole batch back to its sender."""
    text = repr(value)
    return ConfigError(name, rule, value if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "…", remedy)


def as_object(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise bad_field(name, "must be a JSON object", value, "Send {...}.")
    return value


class Fields:
    """One JSON object. ``null`` and an absent field both mean the default, as they do for SGLang.

    Example: ``Fields({"top_p": 0.9}, "sampling_params.").number("top_p", 1.0) == 0.9``
    """

    def __init__(self, data: Mapping[str, Any], prefix: str = "") -> None:
        self._data, self._prefix = data, prefix

    def check_names(self, known: Iterable[str]) -> None:
        """Refuse the first name that is none of ``known``."""
        names = sorted(known)
        for name in self._data:
            if name not in names:
                raise bad_field(
                    self._prefix + name,
                    "is not a field of this request",
                    self._data[name],
                    f"{did_you_mean(name, names)}The fields are {', '.join(names)}.",
                )

    def raw(self, name: str) -> Any:
        return self._data.get(name)

    def number(self, name: str, default: float) -> float:
        value = self._data.get(name)
        if value is None:
            return default
        if (number := finite(value)) is None:
            raise self._bad(name, "must be a finite number", value)
        return number

    def whole(self, name: str, default: int, minimum: int | None = None) -> int:
        value = self._data.get(name)
        if value is None:
            return default
        if not is_whole(value) or (minimum is not None and value < minimum):
            at_least = "" if minimum is None else f" of at least {minimum}"
            raise self._bad(name, f"must be a whole number{at_least}", value)
        return int(value)

    def switch(self, name: str, default: bool = False) -> bool:
        value = self._data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._bad(name, "must be true or false", value)
        return value

    def text(self, name: str, default: str = "") -> str:
        value = self._data.get(name)
        if value is None:
            return default
        if not is_text(value):
            raise self._bad(name, "must be a text", value)
        return value

    def choice(self, name: str, choices: Sequence[Choice], default: Choice) -> Choice:
        value = self.text(name, default)
        for choice in choices:
            if choice == value:
                return choice
        raise self._bad(name, f"must be one of {', '.join(choices)}", value)

    def texts(self, name: str) -> tuple[str, ...]:
        """A text or a list of texts."""
        value = self._data.get(name)
        values = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(map(is_text, values)):
            raise self._bad(name, "must be a text or a list of texts", value)
        return tuple(values)

    def wholes(self, name: str) -> tuple[int, ...]:
        value = self._data.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(map(is_whole, value)):
            raise self._bad(name, "must be a list of whole numbers", value)
        return tuple(value)

    def _bad(self, name: str, rule: str, value: object) -> ConfigError:
        return bad_field(self._prefix + name, rule, value, "Correct the field or leave it out.")


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: object) -> bool:
    """A string of whole characters: JSON can spell half of a surrogate pair, which is in no encoding."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def finite(value: object) -> float | None:
    """The number as a float, None for what is no number or no finite one (JSON's may have any size)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
