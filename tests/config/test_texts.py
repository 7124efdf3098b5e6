"""Texts of the command line become values of exactly their kind."""

from __future__ import annotations

import pytest

from slime_spec.config.texts import PARSERS


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("int", "-3", -3),
        ("float", "-1e-6", -1e-6),
        ("float", "3", 3.0),
        ("bool", "On", True),
        ("bool", "no", False),
        ("suffixed_int", "8192", 8192),
        ("suffixed_int", "8k", 8000),
        ("suffixed_int", "25.6k", 25600),
        ("suffixed_int", "2Ki", 2048),
        ("suffixed_int", "1Mi", 1048576),
        ("suffixed_int", "-1", -1),
        ("json", '{"a": [1, null]}', {"a": [1, None]}),
    ],
)
def test_a_text_of_its_kind_is_read(kind: str, text: str, value: object) -> None:
    assert PARSERS[kind](text) == value
    assert type(PARSERS[kind](text)) is type(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("int", "1.0"),
        ("int", "1_0"),
        ("int", " 1"),
        ("int", "٣"),
        ("float", "inf"),
        ("float", "one"),
        ("bool", ""),
        ("bool", "2"),
        ("suffixed_int", "8K"),
        ("suffixed_int", "8ki"),
        ("suffixed_int", "1.5"),
        ("json", "{"),
    ],
)
def test_a_text_of_another_kind_is_refused(kind: str, text: str) -> None:
    with pytest.raises(ValueError):
        PARSERS[kind](text)
