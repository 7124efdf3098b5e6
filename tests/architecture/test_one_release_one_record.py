"""A release of SGLang is one record: no code but the table of releases compares or names versions."""

from __future__ import annotations

import ast
import re

import pytest

from slime_spec.preflight.checks import TRAPS
from slime_spec.sglang.releases import CHANGES, Release, release_of, since
from tests.architecture.test_imports import MODULES

VERSION = re.compile(r"\b0\.5\.\d+")
HOME = "slime_spec.sglang.releases"
WHYS = {trap.why for trap in TRAPS}


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """Strings that stand alone as statements."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def tells_history(text: str) -> bool:
    """Whether it is (part of) the reason that a trap gives."""
    return " " in text and any(text in why for why in WHYS)


def is_version(node: ast.AST) -> bool:
    """``"... 0.5.21 ..."`` or ``(0, 5, 21)``; what a trap says of history is no code."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and not tells_history(node.value) and VERSION.search(node.value) is not None
    if not isinstance(node, ast.Tuple) or len(node.elts) != 3:
        return False
    numbers = [each.value for each in node.elts if isinstance(each, ast.Constant)]
    return len(numbers) == 3 and numbers[:2] == [0, 5]


def releases_of_contracts(tree: ast.AST) -> set[ast.AST]:
    """The releases that a ``Contract`` of the plug-in is for: shown to people, while names decide what is hooked."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    return {call.args[0] for call in calls if call.func.id == "Contract" and call.args}  # type: ignore[attr-defined]


def names_a_version(source: str) -> bool:
    tree = ast.parse(source)
    prose = docstrings(tree) | releases_of_contracts(tree)
    return any(is_version(node) for node in ast.walk(tree) if node not in prose)


def test_only_the_table_of_releases_names_a_version() -> None:
    assert [module for module, path in MODULES.items() if names_a_version(path.read_text())] == [HOME]


@pytest.mark.parametrize(
    "source",
    [
        "if release.version >= (0, 5, 12): pass",
        'CONTRACT = "0.5.21"',
        'Contract("of sessions", "0.5.21")',
        'def f() -> str:\n    return f"Use SGLang 0.5.6 or newer, not {x}."',
    ],
)
def test_the_rule_catches_a_version_in_code(source: str) -> None:
    assert names_a_version(source)


@pytest.mark.parametrize(
    "source",
    ['"""Since 0.5.3."""', "x = 1  # from 0.5.10 on", "CHOSEN = (0, 5, 7, 3)", 'Contract("0.5.1 to 0.5.2", x)'],
)
def test_the_rule_leaves_prose_alone(source: str) -> None:
    assert not names_a_version(source)


def test_a_record_holds_from_its_release_on_and_not_before() -> None:
    versions = [release_of(change.version).version for change in CHANGES[1:]]
    assert versions == sorted(set(versions))
    for change in CHANGES[1:]:
        (*front, last) = release_of(change.version).version
        before = Release((*front, last - 1), "before", is_installed=True)
        for ability in change.abilities:
            assert since(ability) == change.version
            assert release_of(change.version).does(ability)
            assert release_of("9.0").does(ability)
            assert not before.does(ability)
