"""Decide the conditions of a shell script (``[ -z "$X" ]``, ``[[ a == b ]]``) that the script itself decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from slime_spec.launch.port.expansion import Shell, source_of, text_of
from slime_spec.launch.port.text import open_parts

if TYPE_CHECKING:
    from tree_sitter import Node

COMPARED: Mapping[str, Callable[[int, int], bool]] = {
    "-eq": int.__eq__,
    "-ne": int.__ne__,
    "-lt": int.__lt__,
    "-le": int.__le__,
    "-gt": int.__gt__,
    "-ge": int.__ge__,
}


def decided(node: Node, shell: Shell) -> bool | None:
    """Return whether a condition holds; None where the script does not say."""
    match node.type:
        case "test_command" | "parenthesized_expression" if len(node.named_children) == 1:
            return decided(node.named_children[0], shell)
        case "list" | "binary_expression" if _operator(node) in ("&&", "||"):
            return _joined(_operator(node), *(decided(each, shell) for each in (node.children[0], node.children[-1])))
        case "unary_expression" | "negated_command":
            return _unary(node, shell)
        case "binary_expression":
            return _binary(node, shell)
        case "command" if source_of(node) in ("true", "false"):
            return source_of(node) == "true"
    return None


def _operator(node: Node) -> str:
    return source_of(node.children[1]) if len(node.children) == 3 else ""


def _joined(operator: str, left: bool | None, right: bool | None) -> bool | None:
    decisive = operator == "||"
    if decisive in (left, right):
        return decisive
    return None if None in (left, right) else not decisive


def _unary(node: Node, shell: Shell) -> bool | None:
    operator, operand = source_of(node.children[0]), node.children[-1]
    if operator == "!":
        held = decided(operand, shell)
        return None if held is None else not held
    # A test asks whether a variable is there: one that nobody sets is empty.
    text = _known(operand, shell)
    match operator:
        case "-z" | "-n":
            return None if text is None else (not text) == (operator == "-z")
        case "-f" | "-d" | "-e" if text:
            path = Path(text)
            return {"-f": path.is_file, "-d": path.is_dir, "-e": path.exists}[operator]()
    return None


def _binary(node: Node, shell: Shell) -> bool | None:
    operator = _operator(node)
    left, right = _known(node.children[0], shell), _known(node.children[-1], shell)
    if left is None or right is None:
        return None
    if operator in ("=", "==", "!="):
        return fnmatchcase(left, right) == (operator != "!=")
    if operator in COMPARED and all(each.lstrip("-").isdigit() for each in (left, right)):
        return COMPARED[operator](int(left), int(right))
    return None


def _known(node: Node, shell: Shell) -> str | None:
    """Return the text of an operand, in which a variable that is not set is empty; None where it is not known."""
    text = text_of(node, shell)
    for source in open_parts(text):
        name = source.removeprefix("${").removesuffix("}")
        if name in shell.variables or not name.isidentifier():
            return None
        text = text.replace(f"\ue000{source}\ue001", "")
    return text
