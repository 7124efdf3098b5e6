"""A model family is one file: nothing but its file in ``families/`` names its architectures."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import cache

import pytest

from slime_spec.checkpoints.families import FAMILIES, FORMATS
from tests.architecture.test_imports import MODULES, ROOT

HOME = "slime_spec/checkpoints/families/"
# A family or format and every architecture that its record names.
RECORDS: Mapping[str, tuple[str, ...]] = {
    **{family.architecture: family.architectures for family in FAMILIES},
    **{f"{each.family} draft": (*each.blocks, *each.served) for each in FORMATS},
}
# File -> why it may name architectures of its own.
EXCEPTIONS = {
    "slime_spec/algorithms.py": "SGLang's list of targets for which its automatic draft shape is a tree",
}
PRODUCT = {str(path.relative_to(ROOT)): path for path in MODULES.values()}


def strings_of_code(source: str) -> list[str]:
    """The string constants of a source; docstrings and comments are no code."""
    tree = ast.parse(source)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    prose = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]


def words_of_code(source: str) -> set[str]:
    """Every word in the string constants of a source."""
    return {word for text in strings_of_code(source) for word in re.findall(r"\w+", text)}


@cache
def words_of_product() -> Mapping[str, set[str]]:
    return {name: words_of_code(path.read_text()) for name, path in PRODUCT.items()}


def files_that_name(architectures: tuple[str, ...], words: Mapping[str, set[str]]) -> set[str]:
    """The product files whose code has the name of one of ``architectures``."""
    return {name for name, found in words.items() if found & set(architectures)}


@pytest.mark.parametrize("record", RECORDS)
def test_a_family_is_named_in_its_own_file_alone(record: str) -> None:
    named_in = files_that_name(RECORDS[record], words_of_product())
    assert len([name for name in named_in if name.startswith(HOME)]) == 1
    assert {name for name in named_in if not name.startswith(HOME)} <= EXCEPTIONS.keys()


def test_the_exceptions_are_needed() -> None:
    everything = tuple(name for names in RECORDS.values() for name in names)
    assert EXCEPTIONS.keys() <= files_that_name(everything, words_of_product())


@pytest.mark.parametrize(
    ("source", "is_named"),
    [
        ('if architecture == "LlamaForCausalLM": pass', True),
        ('rule = f"must be a LlamaForCausalLM, not {name}"', True),
        ('def read():\n    return {"LlamaForCausalLM": 1}', True),
        ('"""Reads a LlamaForCausalLM."""\nx = 1  # LlamaForCausalLM', False),
        ('def read():\n    """Reads a LlamaForCausalLM."""', False),
        ('name = "LlamaForCausalLMEagle3"', False),
    ],
)
def test_the_count_sees_code_and_no_prose(source: str, is_named: bool) -> None:
    found = files_that_name(("LlamaForCausalLM",), {"a.py": words_of_code(source)})
    assert bool(found) == is_named
