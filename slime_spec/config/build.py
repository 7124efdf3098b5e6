"""This module alone makes a Config from what a user wrote: plain data to the typed configuration and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import yaml

from slime_spec.config.schema import SGLANG, nodes, settings
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError, raise_all
from slime_spec.suggest import did_you_mean


def from_dict(data: Mapping[Any, object]) -> Config:
    """Return the Config that nested plain data describes; an absent setting keeps its default.

    Raises ConfigError for unknown keys, wrong types, values out of range or not among the choices, all at once. The
    ``sglang`` node may hold anything plain; its flags are checked where their table is (slime_spec.launch).
    """
    built: dict[str, Any] = {}
    errors: list[ConfigError] = []
    for node, values in data.items():
        if node != SGLANG and node not in nodes():
            errors.append(unknown_setting(str(node)))
        elif not isinstance(values, Mapping):
            rule = "must be a group of settings"
            errors.append(ConfigError(str(node), rule, values, f"Write {node}.SETTING=VALUE."))
        else:
            built[node] = frozen(values) if node == SGLANG else _node(node, values, errors)
    raise_all(errors)
    return Config(**built)


def _node(node: str, values: Mapping[Any, object], errors: list[ConfigError]) -> Any:
    """Return the node's dataclass of the values that are right; the others are added to ``errors``."""
    checked = {}
    for name, value in values.items():
        path = f"{node}.{name}"
        if path not in settings():
            errors.append(unknown_setting(path))
            continue
        try:
            checked[name] = settings()[path].check(value)
        except ConfigError as error:
            errors.append(error)
    return nodes()[node](**checked)


def unknown_setting(path: str) -> ConfigError:
    """Return the error for a path that is not in the tree, with the nearest path that is."""
    same_leaf = [known for known in settings() if known.rpartition(".")[2] == path.rpartition(".")[2]]
    hint = (
        f"Did you mean {' or '.join(same_leaf)}? " if same_leaf else did_you_mean(path, [*settings(), *nodes(), SGLANG])
    )
    return ConfigError(
        path,
        "is not a setting",
        path,
        f"{hint}`slime-spec config` prints every setting, `slime-spec train --help` explains them.",
    )


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return nested plain data (tuples as lists) from which ``from_dict`` makes an equal Config."""
    plain = {
        node: {leaf.name: thawed(getattr(getattr(config, node), leaf.name)) for leaf in fields(cls)}
        for node, cls in nodes().items()
    }
    return {**plain, SGLANG: thawed(config.sglang)}


def frozen(value: Any) -> Any:
    """Return plain data with tuples for its lists."""
    if isinstance(value, Mapping):
        return {str(key): frozen(item) for key, item in value.items()}
    return tuple(frozen(item) for item in value) if isinstance(value, list | tuple) else value


def thawed(value: Any) -> Any:
    """Return plain data with lists for its tuples."""
    if isinstance(value, Mapping):
        return {key: thawed(item) for key, item in value.items()}
    return [thawed(item) for item in value] if isinstance(value, list | tuple) else value


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as a file that ``--config PATH.yaml`` reloads to an equal Config."""
    return yaml.dump(_quoted(to_dict(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Text(str):
    """Marks a string value to be written in quotes: YAML readers disagree on a bare ``1e-6``, ``on`` or ``null``."""


class _Dumper(yaml.SafeDumper):
    """Dumps YAML as PyYAML's safe dumper does, with quoted texts and no anchors for values that occur twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_representer(_Text, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def _quoted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _quoted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_quoted(item) for item in value]
    return _Text(value) if isinstance(value, str) else value
