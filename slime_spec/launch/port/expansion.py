"""Expand the words of a shell script as bash does, as far as the script itself says their values; nothing is run."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from slime_spec.launch.port.text import fields, open_part, open_parts

if TYPE_CHECKING:
    from tree_sitter import Node

MOST_NUMBERS = 10_000  # of a seq
ESCAPES_IN_QUOTES = re.compile(r'\\([$`"\\]|\n)')
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
ESCAPES = re.compile(r"\\(\n|.)", re.DOTALL)
OPERATORS = frozenset((":-", "-", ":=", "=", ":?", "?", ":+", "+", "%", "%%", "#", "##"))


@dataclass
class Shell:
    """Holds the variables that a script has set so far; ``environment`` says what it finds set.

    ``file`` is the file that is being read: the script, or one that it sources.
    """

    script: Path
    file: Path
    environment: Mapping[str, str]
    variables: dict[str, str | list[str]] = field(default_factory=dict)

    def value(self, name: str) -> str | None:
        """Return a variable's text (of an array its first); None where nobody sets it."""
        if name in ("0", "BASH_SOURCE"):
            return str(self.script if name == "0" else self.file)
        found = self.variables.get(name)
        if isinstance(found, list):
            return found[0] if found else None
        return self.environment.get(name) if found is None else found


def source_of(node: Node) -> str:
    assert node.text is not None, "the tree was made of a text that is kept"
    return node.text.decode()


def all_words(nodes: Iterable[Node], shell: Shell) -> list[str]:
    """Return the words of an array's or a command's nodes.

    Nodes that touch are one word, which the parser cuts in two where a bracket stands before: ``[0]*$DENSE+[1]*$MOE``.
    """
    touching: list[list[Node]] = []
    for node in nodes:
        if touching and touching[-1][-1].end_byte == node.start_byte:
            touching[-1].append(node)
        else:
            touching.append([node])
    words: list[str] = []
    for group in touching:
        if len(group) == 1:
            words += words_of(group[0], shell)
        else:
            source = "".join(map(source_of, group))
            words.append(VARIABLE.sub(lambda found: _variable(found[1] or found[2], found[0], shell), source))
    return words


def words_of(node: Node, shell: Shell) -> list[str]:
    """Return the words that a node of a command or an array becomes: none, one, or several without quotes."""
    array = _array(node, shell)
    if array is not None:
        return array if node.type == "string" else [word for item in array for word in fields(item)]
    if node.type in ("simple_expansion", "expansion", "command_substitution", "arithmetic_expansion"):
        return fields(text_of(node, shell))
    return [text_of(node, shell)]


def _array(node: Node, shell: Shell) -> list[str] | None:
    """Return the elements where the node is ``${NAME[@]}``, in quotes or not; of a name that is not set, none."""
    found = re.fullmatch(r'"?\$\{(\w+)\[[@*]\]\}"?', source_of(node))
    if found is None:
        return None
    value = shell.variables.get(found[1], [])
    return value if isinstance(value, list) else [value]


def text_of(node: Node, shell: Shell) -> str:
    """Return the one text that a node becomes, in quotes."""
    source = source_of(node)
    match node.type:
        case "raw_string":
            return source[1:-1]
        case "string":
            return _string(node, shell)
        case "concatenation" | "command_name":
            return "".join(text_of(child, shell) for child in node.named_children)
        case "simple_expansion":
            return _variable(source[1:], source, shell)
        case "expansion":
            return _expansion(node, shell)
        case "arithmetic_expansion" | "command_substitution" if source.startswith("$((") and source.endswith("))"):
            return _arithmetic(source, shell)  # within ${...} the parser takes it for a command
        case "command_substitution":
            return _substitution(node, shell)
        case "ansi_c_string" | "translated_string" | "process_substitution" | "brace_expression":
            return open_part(source)
    return ESCAPES.sub(lambda found: "" if found[1] == "\n" else found[1], source)


def _string(node: Node, shell: Shell) -> str:
    """Return what stands between double quotes; the parser's tree leaves out some of it, as blanks between parts."""
    source, start = node.text or b"", node.start_byte
    done, pieces = 1, []
    for child in node.named_children:
        if child.type == "string_content":
            continue
        pieces += [_unescaped(source[done : child.start_byte - start]), text_of(child, shell)]
        done = child.end_byte - start
    return "".join([*pieces, _unescaped(source[done:-1])])


def _unescaped(source: bytes) -> str:
    return ESCAPES_IN_QUOTES.sub(lambda found: "" if found[1] == "\n" else found[1], source.decode())


def _variable(name: str, source: str, shell: Shell) -> str:
    value = shell.value(name)
    return open_part(f"${{{name}}}" if name.isidentifier() else source) if value is None else value


def _expansion(node: Node, shell: Shell) -> str:
    """Expand ``${NAME}`` and its forms with a default, an alternative, or a prefix or suffix that is cut off."""
    source = source_of(node)
    children = node.children
    name = next((each for each in children if each.type in ("variable_name", "subscript")), None)
    operator = next((each for each in children if source_of(each) in OPERATORS), None)
    if name is None or children.index(name) != 1:
        return open_part(source)  # ${#NAME}, ${!NAME}
    plain = source_of(name).removesuffix("[0]").removesuffix("[@]").removesuffix("[*]")
    if not plain.isidentifier():
        return open_part(source)
    if operator is None:
        return _variable(plain, source, shell) if len(node.named_children) == 1 else open_part(source)
    rest = "".join(text_of(child, shell) for child in children[children.index(operator) + 1 : -1])
    value = shell.value(plain)
    if value is not None and open_parts(value):
        return value if source_of(operator) in (":-", "-") else open_part(source)
    return _with_operator(source_of(operator), value, rest, source)


def _with_operator(operator: str, value: str | None, rest: str, source: str) -> str:
    is_there = value if operator.startswith(":") else value is not None
    match operator.lstrip(":"):
        case "-" | "=":
            return value if is_there and value is not None else rest
        case "+":
            return rest if is_there else ""
        case "%" | "%%" | "#" | "##" if value is not None:
            return _cut(operator, value, rest)
    return value if is_there and value is not None else open_part(source)


def _cut(operator: str, value: str, pattern: str) -> str:
    """Cut the shortest (of ``%%`` and ``##`` the longest) end or beginning that the pattern matches off a text."""
    lengths = range(len(value), -1, -1) if len(operator) == 2 else range(len(value) + 1)
    for length in lengths:
        kept = value[: len(value) - length] if operator[0] == "%" else value[length:]
        cut = value[len(value) - length :] if operator[0] == "%" else value[:length]
        if fnmatchcase(cut, pattern):
            return kept
    return value


def _arithmetic(source: str, shell: Shell) -> str:
    """Compute sums, differences, products and quotients of whole numbers."""
    inner = source.removeprefix("$((").removesuffix("))")
    named = re.sub(r"\$?\{?([A-Za-z_]\w*)\}?", lambda found: str(shell.value(found[1])), inner)
    try:
        return str(_number(ast.parse(named.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return open_part(source)


def _number(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in ARITHMETIC:
            return ARITHMETIC[type(operator)](_number(left), _number(right))
    raise ValueError("is not of whole numbers alone")


ARITHMETIC: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: int.__add__,
    ast.Sub: int.__sub__,
    ast.Mult: int.__mul__,
    ast.Div: lambda left, right: int(left / right),
    ast.Mod: lambda left, right: left - right * int(left / right),
}


def _substitution(node: Node, shell: Shell) -> str:
    """Answer the commands whose output follows from their words: a folder, a name, numbers, an echo."""
    folder: str | None = None
    output = open_part(source_of(node))
    for command in _commands(node):
        words = [word for child in command.named_children for word in words_of(child, shell) if word != "--"]
        if any(map(open_parts, words)):
            return open_part(source_of(node))
        match words:
            case ["cd", path]:
                folder = os.path.normpath(path)
            case ["pwd"]:
                output = folder or str(shell.script.parent)
            case ["dirname", path]:
                output = os.path.dirname(path) or "."
            case ["basename", path]:
                output = os.path.basename(path.rstrip("/"))
            case ["realpath", path] | ["readlink", "-f", path]:
                output = os.path.normpath(path)
            case ["echo", *texts]:
                output = " ".join(texts)
            case ["seq", *numbers] if 1 <= len(numbers) <= 3 and all(re.fullmatch(r"-?\d+", each) for each in numbers):
                output = _sequence([int(each) for each in numbers], output)
            case _:
                return open_part(source_of(node))
    return output


def _commands(node: Node) -> list[Node]:
    """Return the commands of a substitution in order; empty where it has more than commands after one another."""
    found: list[Node] = []
    for child in node.named_children:
        if child.type == "command":
            found.append(child)
        elif (
            child.type == "list"
            and all(each.type in ("&&", "command", "redirected_statement") for each in child.children)
        ) or child.type == "redirected_statement":
            found += _commands(child)
        elif child.type != "file_redirect":
            return []
    return found


def _sequence(numbers: list[int], otherwise: str) -> str:
    first, step, last = {1: [1, 1, *numbers], 2: [numbers[0], 1, *numbers[1:]]}.get(len(numbers), numbers)
    values = range(first, last + (1 if step > 0 else -1), step) if step else range(0)
    return "\n".join(map(str, values)) if 0 < len(values) <= MOST_NUMBERS else otherwise
