"""Hypothesis strategies over the configuration tree."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from slime_spec.config.build import from_dict
from slime_spec.config.schema import Setting, settings
from slime_spec.config.tree import Config

# Texts that trip YAML readers and Hydra's grammar, among arbitrary ones.
AWKWARD = [
    "on",
    "no",
    "null",
    "1e-6",
    "-1",
    "a=b",
    "a b",
    "a,b",
    "{a}",
    "[a",
    "${run.name}",
    "\\${x}",
    "\\",
    "'",
    '"\\\'"',
]
ANY = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
texts = st.one_of(st.sampled_from(AWKWARD), ANY, st.text(alphabet="\\'\"${}[],:= \n#é", max_size=12))
names = texts.filter(bool)  # most settings refuse an empty text


def values(setting: Setting) -> st.SearchStrategy[Any]:
    """Any value that the setting allows."""
    one = _one(setting)
    if setting.is_tuple:
        one = st.lists(one, max_size=3).map(tuple)
    return st.none() | one if setting.is_optional else one


def _one(setting: Setting) -> st.SearchStrategy[Any]:
    if setting.choices:
        return st.sampled_from(setting.choices)
    if setting.type is str:
        return texts if setting.may_be_empty else names
    if setting.type is bool:
        return st.booleans()
    if setting.type is int:
        low = None if setting.minimum is None else int(setting.minimum)
        return st.integers(low, None if setting.maximum is None else int(setting.maximum))
    low = setting.minimum if setting.above is None else setting.above
    high = setting.maximum if setting.below is None else setting.below
    is_open = setting.above is not None, setting.below is not None
    return st.floats(low, high, allow_nan=False, allow_infinity=False, exclude_min=is_open[0], exclude_max=is_open[1])


def configs() -> st.SearchStrategy[Config]:
    """Any Config whose settings are each allowed (together they may contradict)."""
    return st.fixed_dictionaries({path: values(each) for path, each in settings().items()}).map(nested)


def nested(flat: dict[str, Any]) -> Config:
    data: dict[str, dict[str, Any]] = {}
    for path, value in flat.items():
        node, _, leaf = path.partition(".")
        data.setdefault(node, {})[leaf] = value
    return from_dict(data)
