"""How the names that the SGLang plug-in uses look in each release, read from the wheels' sources, not imported.

    python -m tests.support.sglang_names              reads the releases that sglang_names.json has once more
    python -m tests.support.sglang_names 0.5.24       and another one

A function's fact is its parameters, a class's are the members and attributes that the plug-in uses; there is none where
the release lacks the name. Wheels of tens of MB are downloaded by pip into a folder of the cache (XDG_CACHE_HOME),
once.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from rollout.sglang_engine.plugin.entry import FEATURES
from rollout.sglang_engine.plugin.hooks import Name

FACTS = Path(__file__).with_suffix(".json")
WHEELS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "slime_spec" / "sglang-wheels"
Fact = tuple[str, ...] | None
Facts = Mapping[str, Mapping[str, Fact]]  # by name, then by release


class Sources:
    """The Python files of one release."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = files

    @classmethod
    def of_wheel(cls, wheel: Path) -> Sources:
        with zipfile.ZipFile(wheel) as packed:
            names = [name for name in packed.namelist() if re.fullmatch(r"sglang/srt/.*\.py", name)]
            return cls({name: packed.read(name).decode() for name in names})

    def fact(self, name: Name) -> Fact:
        """The parameters of a function in their order, or what of a class there is that ``name`` asks for."""
        found = self._find(*self._split(name.target))
        if isinstance(found, ast.ClassDef):
            module = self._split(name.target)[0]
            there = tuple(member for member in name.members if member in self._members(module, found))
            return (*there, *(each for each in name.attributes if each in self._attributes(module, found)))
        return None if found is None else parameters(found)

    def _split(self, target: str) -> tuple[str, list[str]]:
        """The file of the longest prefix that is a module, and the names inside it."""
        parts = target.split(".")
        for end in range(len(parts), 0, -1):
            for file in ("/".join(parts[:end]) + ".py", "/".join([*parts[:end], "__init__.py"])):
                if file in self._files:
                    return file, parts[end:]
        return "", parts

    def _find(self, file: str, path: list[str]) -> ast.AST | None:
        if not file or not path:
            return None
        node = _defined(self._tree(file), path[0])
        if node is None or len(path) == 1:
            return node
        return self._method(file, node, path[1]) if isinstance(node, ast.ClassDef) else None

    def _method(self, file: str, owner: ast.ClassDef, name: str) -> ast.AST | None:
        for _, each in self._mro(file, owner):
            if (found := _defined(each, name)) is not None:
                return found
        return None

    def _members(self, file: str, owner: ast.ClassDef) -> set[str]:
        return {name for _, each in self._mro(file, owner) for name in _names(each)}

    def _attributes(self, file: str, owner: ast.ClassDef) -> set[str]:
        nodes = (node for _, each in self._mro(file, owner) for node in ast.walk(each))
        return {node.attr for node in nodes if isinstance(node, ast.Attribute) and _is_self(node.value)}

    def _mro(self, file: str, owner: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and its bases in SGLang, whose order matters nowhere here."""
        yield file, owner
        for base in owner.bases:
            if isinstance(base, ast.Name):
                where = self._imported(file).get(base.id)
                place, inside = (file, [base.id]) if where is None else self._split(where)
                if isinstance(node := self._find(place, inside), ast.ClassDef):
                    yield from self._mro(place, node)

    def _imported(self, file: str) -> dict[str, str]:
        """Where each name comes from that a file imports, which may call it otherwise."""
        froms = (node for node in ast.walk(self._tree(file)) if isinstance(node, ast.ImportFrom) and node.module)
        return {name.asname or name.name: f"{node.module}.{name.name}" for node in froms for name in node.names}

    @cached_property
    def _trees(self) -> dict[str, ast.Module]:
        return {}

    def _tree(self, file: str) -> ast.Module:
        if file not in self._trees:
            self._trees[file] = ast.parse(self._files[file])
        return self._trees[file]


def parameters(function: ast.AST) -> tuple[str, ...]:
    """The parameters in the order of inspect.signature."""
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef), ast.dump(function)
    given = function.args
    named = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return tuple(each.arg for each in named if each is not None)


def _defined(owner: ast.Module | ast.ClassDef, name: str) -> ast.AST | None:
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [node for node in owner.body if isinstance(node, kinds) and node.name == name]
    return found[-1] if found else None


def _names(owner: ast.ClassDef) -> Iterator[str]:
    for node in owner.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def used() -> list[Name]:
    """Every name that a contract of the plug-in has; a class once, with all that any contract asks for of it."""
    members, attributes = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for name in (name for feature in FEATURES for contract in feature.contracts for name in contract.names):
        members[name.target].update(name.members)
        attributes[name.target].update(name.attributes)
    return [
        Name(target, members=tuple(sorted(members[target])), attributes=tuple(sorted(attributes[target])))
        for target in sorted(members)
    ]


def wheel(release: str) -> Path:
    """The release's wheel, downloaded where it is not there; raises subprocess.CalledProcessError where pip fails."""
    there = list(WHEELS.glob(f"sglang-{release}-*.whl"))
    if not there:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", str(WHEELS), f"sglang=={release}"], check=True, capture_output=True)
        there = list(WHEELS.glob(f"sglang-{release}-*.whl"))
    return there[0]


def facts_of(releases: Iterable[str], names: Sequence[Name]) -> dict[str, dict[str, Fact]]:
    facts: dict[str, dict[str, Fact]] = {name.target: {} for name in names}
    for release in releases:
        sources = Sources.of_wheel(wheel(release))
        for name in names:
            facts[name.target][release] = sources.fact(name)
    return facts


def recorded() -> tuple[list[str], dict[str, dict[str, Fact]]]:
    """The releases that were read, oldest first, and their facts; the file has a fact at the release that began it."""
    kept = json.loads(FACTS.read_text())
    facts: dict[str, dict[str, Fact]] = {}
    for target, changes in kept["names"].items():
        fact: Fact = None
        facts[target] = {}
        for release in kept["releases"]:
            if release in changes:
                fact = None if changes[release] is None else tuple(changes[release])
            facts[target][release] = fact
    return kept["releases"], facts


def changes_of(by_release: Mapping[str, Fact]) -> dict[str, Fact]:
    """Each fact at the release that began it."""
    releases = list(by_release)
    pairs = zip(releases, [None, *releases], strict=False)
    return {now: by_release[now] for now, before in pairs if before is None or by_release[now] != by_release[before]}


def key(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release))


def main() -> None:
    known = json.loads(FACTS.read_text())["releases"] if FACTS.is_file() else []
    releases = sorted({*known, *sys.argv[1:]}, key=key)
    facts = facts_of(releases, used())
    rows = {target: changes_of(by_release) for target, by_release in facts.items()}
    FACTS.write_text(json.dumps({"releases": releases, "names": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
