"""Read a launch script's statements in order, without running it, up to the words behind ``train.py``.

Assignments, arrays, sourced files, conditions, loops over words and functions are followed as bash would; every other
command is passed over. What the reading cannot know (a variable that nobody sets, what a program would print) stays
open in the words, and is told by its line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from slime_spec.errors import ConfigError
from slime_spec.files import read_text
from slime_spec.launch.port.condition import decided
from slime_spec.launch.port.expansion import Shell, all_words, source_of, text_of
from slime_spec.launch.port.text import open_part, open_parts

if TYPE_CHECKING:
    from tree_sitter import Node, Parser

PROGRAM = re.compile(r"(?:.*/)?train(?:_async)?\.py")  # slime's two
DEEPEST = 20  # files and functions within one another
MOST_STATEMENTS, LONGEST = 100_000, 1_000_000  # that are followed, with loops' repetitions; characters of a variable
REMEDY = "Pass slime's launch script, in which `train.py` or `train_async.py` is called."


@dataclass(frozen=True)
class Note:
    """Tells of a line that could not be followed; ``names`` are the variables that it may set."""

    text: str
    names: frozenset[str] = frozenset()


@dataclass
class Launch:
    """Holds what a script runs: slime's program and its words; and the script's lines that could not be followed."""

    program: str = ""
    words: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    @property
    def not_followed(self) -> list[str]:
        """Return what to tell of: what may matter to the launch, for what a line sets is in the words, or not known."""
        open_now = "".join(source for word in self.words for source in open_parts(word))
        return [note.text for note in self.notes if not note.names or any(name in open_now for name in note.names)]


def read_script(path: Path, environment: Mapping[str, str]) -> Launch:
    """Return what the script launches; raises ConfigError where it cannot be read or launches nothing of slime's."""
    reader = _Reader(path, environment)
    try:
        reader.read_file(path)
    except RecursionError:
        raise ConfigError("port", "nests its statements too deeply", str(path), REMEDY) from None
    if not reader.launch.program:
        rule = "must call slime's train.py or train_async.py"
        raise ConfigError(
            "port", f"{rule}{''.join(f'; {line}' for line in reader.launch.not_followed)}", str(path), REMEDY
        )
    return reader.launch


def _parser() -> Parser:
    try:
        from tree_sitter import Language, Parser
        from tree_sitter_bash import language
    except ImportError:
        rule = "needs tree-sitter and its grammar of bash"
        raise ConfigError("port", rule, None, "pip install 'slime_spec[port]'") from None
    return Parser(Language(language()))


class _Reader:
    def __init__(self, script: Path, environment: Mapping[str, str]) -> None:
        self.parser = _parser()
        absolute = Path(os.path.abspath(script))
        self.shell = Shell(absolute, absolute, environment)
        self.launch = Launch()
        self.functions: dict[str, Node] = {}
        self.depth, self.is_told, self.num_statements = 0, False, 0

    def read_file(self, path: Path) -> None:
        outer, self.shell.file = self.shell.file, Path(os.path.abspath(path))
        self.launch.files.append(path)
        root = self.parser.parse(read_text(path, remedy=REMEDY).encode()).root_node
        for broken in _broken(root):
            self.note(broken, "is no bash that the parser knows")
        self.read_all(root)
        self.shell.file = outer

    def note(self, node: Node, what: str, names: frozenset[str] = frozenset()) -> None:
        first = source_of(node).strip().split("\n")[0][:60]
        self.launch.notes.append(Note(f"{self.shell.file.name}:{node.start_point[0] + 1} {what}: {first}", names))

    def read_all(self, node: Node) -> None:
        for child in node.named_children:
            if not self.launch.program:
                self.read(child)
            elif child.type == "command" and source_of(child).lstrip('"').startswith("${") and not self.is_told:
                self.is_told = True
                self.note(child, "is no part of the launch, for the line before it does not end in \\")

    def read(self, node: Node) -> None:
        """Follow one statement."""
        self.num_statements += 1
        if self.num_statements > MOST_STATEMENTS:
            rule = f"must come to its launch within {MOST_STATEMENTS} statements, loops' repetitions counted"
            raise ConfigError("port", rule, str(self.shell.script), REMEDY)
        match node.type:
            case "variable_assignment":
                self.assign(node)
            case "command":
                self.command(node)
            case "if_statement":
                self.branch(node)
            case "case_statement":
                self.case(node)
            case "for_statement":
                self.loop(node)
            case "function_definition":
                self.functions[source_of(node.named_children[0])] = node.named_children[-1]
            case "list":
                self.listed(node)
            case "c_style_for_statement" | "while_statement":
                self.leave_open(node, "is a loop that is not followed")
            case "subshell" | "compound_statement" | "pipeline" | "redirected_statement" | "declaration_command":
                self.read_all(node)
            case "program" | "do_group" | "else_clause" | "negated_command" | "variable_assignments":
                self.read_all(node)

    def assign(self, node: Node) -> None:
        name, value = node.named_children[0], node.child_by_field_name("value")
        if name.type == "subscript":
            return self.assign_element(node, value)
        plain, is_added = source_of(name), any(child.type == "+=" for child in node.children)
        before = self.shell.variables.get(plain, [] if is_added else "")
        if value is not None and value.type == "array":
            words = all_words((child for child in value.named_children if child.type != "comment"), self.shell)
            was = before if isinstance(before, list) else [before]
            self.shell.variables[plain] = [*was, *words] if is_added else words
        else:
            text = "" if value is None else text_of(value, self.shell)
            was_text = before if isinstance(before, str) else "".join(before)
            whole = was_text + text if is_added else text
            self.shell.variables[plain] = whole if len(whole) <= LONGEST else open_part(f"${{{plain}}}")

    def assign_element(self, node: Node, value: Node | None) -> None:
        """Set ``NAME[2]=text`` of an array that has as many elements."""
        plain, _, index = source_of(node.named_children[0]).removesuffix("]").partition("[")
        array = self.shell.variables.get(plain)
        if not (isinstance(array, list) and index.isdigit() and int(index) <= len(array) and value is not None):
            return self.leave_open(node, "sets one element of an array")
        array[int(index) : int(index) + 1] = [text_of(value, self.shell)]

    def command(self, node: Node) -> None:
        name = node.child_by_field_name("name")
        assignments = [child for child in node.named_children if child.type == "variable_assignment"]
        # The parser takes several assignments of one line, and the command of the next, for one command.
        before_it = [each for each in assignments if name is None or each.end_point[0] < name.start_point[0]]
        for assignment in before_it:
            self.assign(assignment)
        others = ("variable_assignment", "file_redirect", "comment")
        words = all_words((child for child in node.named_children if child.type not in others), self.shell)
        programs = [index for index, word in enumerate(words) if PROGRAM.fullmatch(word)]
        if programs:
            self.launch.program, self.launch.words = os.path.basename(words[programs[0]]), words[programs[0] + 1 :]
        elif words[:1] in (["source"], ["."]) and len(words) > 1:
            before = dict(self.shell.variables)
            set_here = [each for each in assignments if each not in before_it]
            for assignment in set_here:
                self.assign(assignment)
            self.source(node, words[1])
            for plain in (source_of(each.named_children[0]) for each in set_here):
                self.shell.variables[plain] = before.get(plain, "")
        elif words[:2] == ["printf", "-v"] and len(words) > 2:
            self.shell.variables[words[2]] = open_part(f"${{{words[2]}}}")
        elif words and words[0] in self.functions and self.depth < DEEPEST:
            self.depth += 1
            self.read_all(self.functions[words[0]])
            self.depth -= 1

    def source(self, node: Node, text: str) -> None:
        """Read a sourced file; one that lies elsewhere on this machine is found by the end of its path."""
        found = next((path for path in self.places(text) if path.is_file()), None)
        if open_parts(text) or found is None or self.depth >= DEEPEST:
            return self.note(node, "names a file that is not here")
        self.depth += 1
        self.read_file(found)
        self.depth -= 1

    def places(self, text: str) -> Iterator[Path]:
        folder, parts = self.shell.script.parent, Path(text).parts
        yield from (Path(text), folder / text)
        for start in range(1, len(parts)):
            yield from (above.joinpath(*parts[start:]) for above in (folder, *folder.parents))

    def branch(self, node: Node) -> None:
        """Read the branch that the condition takes; where it is not known, all that a branch sets is open."""
        condition = node.child_by_field_name("condition")
        taken = None if condition is None else decided(condition, self.shell)
        if taken is None:
            return self.leave_open(node, "has a condition that is not known here")
        others = [child for child in node.named_children if child.type in ("elif_clause", "else_clause")]
        if taken:
            for child in node.named_children:
                if child != condition and child not in others and not self.launch.program:
                    self.read(child)
            return None
        for index, other in enumerate(others):
            if other.type == "else_clause":
                return self.read_all(other)
            first = other.named_children[0]
            held = decided(first, self.shell)
            if held is None:
                for rest in others[index:]:
                    self.leave_open(rest, "has a condition that is not known here")
                return None
            if held:
                for child in other.named_children[1:]:
                    self.read(child)
                return None
        return None

    def case(self, node: Node) -> None:
        value = node.child_by_field_name("value")
        text = "" if value is None else text_of(value, self.shell)
        if value is None or open_parts(text):
            return self.leave_open(node, "chooses by a value that is not known here")
        for item in (child for child in node.named_children if child.type == "case_item"):
            patterns = item.children_by_field_name("value")
            if any(fnmatchcase(text, text_of(pattern, self.shell)) for pattern in patterns):
                for child in item.named_children[len(patterns) :]:
                    self.read(child)
                return None
        return None

    def loop(self, node: Node) -> None:
        name, body = node.child_by_field_name("variable"), node.child_by_field_name("body")
        words = all_words(node.children_by_field_name("value"), self.shell)
        if name is None or body is None or any(map(open_parts, words)):
            return self.leave_open(node, "is a loop over what is not known here")
        for word in words:
            self.shell.variables[source_of(name)] = word
            self.read_all(body)
        return None

    def listed(self, node: Node) -> None:
        """Follow ``a && b`` where a is known to hold, and ``a || b`` where a is known to fail; else a alone."""
        left, right = node.named_children[0], node.named_children[-1]
        held = decided(left, self.shell)
        if held is None:
            self.read(left)
            held = any(child.type == "&&" for child in node.children) and not left.type.startswith("test")
        if held == any(child.type == "&&" for child in node.children):
            self.read(right)
        elif decided(left, self.shell) is None and _assigned(right):
            self.leave_open(right, "depends on a condition that is not known here")

    def leave_open(self, node: Node, what: str) -> None:
        """Mark every variable that the statement may set as not known, and tell of the statement if there is one."""
        names = _assigned(node)
        for name in names:
            self.shell.variables[name] = open_part(f"${{{name}}}")
        if names:
            self.note(node, f"{what} (sets {', '.join(sorted(names))})", frozenset(names))


def _assigned(node: Node) -> set[str]:
    """Return the variables that a statement may set, at any depth."""
    own = set()
    if node.type == "variable_assignment":
        own = {source_of(node.named_children[0]).partition("[")[0]}
    return own.union(*(_assigned(child) for child in node.named_children))


def _broken(node: Node) -> Iterator[Node]:
    """Yield the parts that the parser could not read."""
    if node.type == "ERROR":
        yield node
    elif node.has_error:
        for child in node.children:
            yield from _broken(child)
