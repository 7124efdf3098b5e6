"""This module alone reads YAML: plain data, or one ConfigError that names the file.

A word is a number where every reader of YAML takes it for the same number: 1e-6 is a number, and 010 (8 or 10), 1_000
and 12:30:45 are texts, as are dates; a setting that wants a number refuses them.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import yaml

from slime_spec.errors import ConfigError
from slime_spec.files import read_text, shortened

MAX_NODES = 100_000  # of a file, aliases written out: settings are few, and nine lines of aliases can stand for 10^9
REMEDY = "Write one with: slime-spec config > PATH.yaml"


def read_yaml_file(path: Path, remedy: str = REMEDY) -> dict[Any, Any]:
    """Return the mapping in the file ``path``, nothing in it interpolated; raises ConfigError for anything else."""
    return read_yaml(read_text(path, remedy=remedy), str(path), remedy)


def read_yaml(text: str, where: str, remedy: str = REMEDY) -> dict[Any, Any]:
    """Return the mapping of a YAML text; raises ConfigError naming ``where`` for anything else."""
    try:
        data = _loaded(text)
    except yaml.YAMLError as error:
        rule = f"must be a readable YAML file: {error}"
    except RecursionError:
        rule = "must be a YAML file that is not nested so deeply"
    except (ValueError, AttributeError) as error:  # of a constructor: !!int x, !!float x
        rule = f"must be a readable YAML file: {error}"
    else:
        if isinstance(data, dict):
            return data
        rule = f"must be a YAML file of named groups, not {type(data).__name__}"
    raise ConfigError(where, rule, shortened(text), remedy)


def _loaded(text: str) -> Any:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _size(root, {}) > MAX_NODES:
            raise yaml.YAMLError(f"it stands for more than {MAX_NODES} values")
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the number of values that ``node`` stands for, its aliases written out; a node within itself is endless.

    ``sizes`` has the nodes seen so far, by identity, so that each is visited once.
    """
    if id(node) not in sizes:
        sizes[id(node)] = MAX_NODES + 1  # until it is known: an alias of a node that is not complete
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = 0 if isinstance(node, yaml.ScalarNode) else sum(_size(part, sizes) for part in parts)
        sizes[id(node)] = 1 + inner
    return sizes[id(node)]


PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")} | {None}


class _Loader(yaml.SafeLoader):
    """Loads YAML as PyYAML's safe loader does, with plain values alone, fewer kinds of words, and no key twice."""

    yaml_constructors: ClassVar = {tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in PLAIN}

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        assert isinstance(node, yaml.MappingNode), "called for mappings"
        if strange := [key for key, _ in node.value if not isinstance(key, yaml.ScalarNode)]:
            raise yaml.YAMLError(f"a key must be a word{strange[0].start_mark}")
        counts = Counter(key.value for key, _ in node.value)
        if twice := [key for key, count in counts.items() if count > 1]:
            raise yaml.YAMLError(f"{', '.join(twice)} is there twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for tag, pattern, first in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^({pattern})$"), list(first))
