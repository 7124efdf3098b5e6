"""Make a Config of a command line: read the files of conf/, lay values over them, and run every check."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from slime_spec.config.api_key import with_key_of_environment
from slime_spec.config.build import from_dict, to_dict
from slime_spec.config.checks import check, notes
from slime_spec.config.schema import SGLANG
from slime_spec.config.speculation import check_environment, unused_draft_settings
from slime_spec.config.speculative import SpeculativeConfig
from slime_spec.config.tree import Config
from slime_spec.config.yaml_file import read_yaml_file
from slime_spec.engines import kind_of
from slime_spec.errors import ConfigError
from slime_spec.launch.arguments import Arguments, read_arguments
from slime_spec.launch.groups import EXPERIMENT, conf_dir, is_path, one_source
from slime_spec.launch.slime.notes import notes_of_slime
from slime_spec.launch.slime.reference import without_converted
from slime_spec.launch.slime.together import MEANINGS, settings_together
from slime_spec.sglang.flags import check_sglang

# Keys that only files of conf/ read: a model's drafts, to which a file of the group speculative points.
DRAFTS = "drafts"
# What --config slime chooses, as slime does, whatever the data are; a file that a run has written names it, too.
SLIMES_TOOL_KEY = "tools"


@dataclass(frozen=True)
class Composed:
    """Holds a configuration; ``notes`` name the settings that were left out or have no effect, one sentence each.

    ``given`` are the paths of the settings that the command line or a file of conf/ sets; others have their defaults.
    ``of_slime`` are slime's flags that are no settings, by their names, to compare with the checkpoint. ``may_lack``
    are settings of keys that nobody chose for these data, which need not have anything under them.
    """

    config: Config
    notes: tuple[str, ...]
    given: frozenset[str]
    of_slime: Mapping[str, Any] = field(default_factory=dict)
    may_lack: frozenset[str] = frozenset()


def compose(argv: Sequence[str]) -> Config:
    """Return the configuration alone; see ``composed``."""
    return composed(argv).config


def composed(argv: Sequence[str]) -> Composed:
    """Compose the configuration that ``argv`` (flags and overrides, without the command's name) describes.

    In rising precedence: the tree's defaults; a file of each group (the command line's choice, else the experiment's,
    else conf/config.yaml's); what the experiment itself sets, or a file in its place; the command line's settings.
    Values on the command line and in a file are literal: only conf/ may interpolate (``${model.hf_checkpoint}``).
    Another algorithm than the experiment's leaves out the experiment's draft, but not one from the command line.
    Raises ConfigError, before any heavy import, for every setting that cannot be honoured.
    """
    arguments = read_arguments(argv)
    groups, values = one_source(arguments.groups, arguments.settings)
    if is_path(groups.get(EXPERIMENT, "")):
        values = {**file_settings(Path(groups.pop(EXPERIMENT))), **values}
    try:
        layers = chosen_files(groups)
        values = {**values, **together(arguments, laid_over(layers, values), frozenset(values))}
        data = laid_over(layers, values)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError("conf", f"must compose: {error}", groups, "Correct the file in conf/.") from None
    config = from_dict(data)
    config = replace(config, sglang=check_sglang(config.sglang))
    config, of_length = _one_length(config, arguments.settings)
    config, of_reference = without_converted(config)
    if kind_of(config).has_servers:
        config = with_key_of_environment(config, os.environ)
    in_files = {f"{node}.{leaf}" for node in layers if node != DRAFTS for leaf in layers[node]}
    spec, default = config.speculative, SpeculativeConfig()
    unused = [name for name in unused_draft_settings(spec) if f"speculative.{name}" not in arguments.settings]
    left_out = (f"speculative.{name} is not used by {spec.algorithm}: left out." for name in unused)
    config = replace(config, speculative=replace(spec, **{name: getattr(default, name) for name in unused}))
    check(config)
    check_environment(os.environ)
    told = (*arguments.notes, *notes_of_slime(arguments.of_slime), *of_length, *of_reference, *left_out, *notes(config))
    is_slimes = config.task.tool_key == SLIMES_TOOL_KEY and "task.tool_key" not in arguments.settings
    may_lack = frozenset({"tool_key"} if is_slimes else ())
    return Composed(config, told, frozenset(values) | in_files, arguments.of_slime, may_lack)


def together(arguments: Arguments, data: Mapping[Any, Any], named: frozenset[str]) -> dict[str, Any]:
    """Return the settings that flags of slime make together with others; ``data`` is the tree without them.

    ``named`` are the settings of the command line and of the user's file.
    """
    given = {name: value for name, value in arguments.of_slime.items() if name in MEANINGS}

    def lookup(path: str) -> Any:
        node, _, leaf = path.partition(".")
        values = data.get(node)
        return values.get(leaf) if isinstance(values, Mapping) else None

    return settings_together(given, lookup, named) if given else {}


def _one_length(config: Config, asked: Mapping[str, object]) -> tuple[Config, tuple[str, ...]]:
    """Let the command line's steps win over the epochs, as in slime; those of a file give way to epochs."""
    if config.run.num_epoch is None or "run.num_rollout" not in asked:
        return config, ()
    note = "--num-rollout says how long the run is, and --num-epoch has no effect."
    return replace(config, run=replace(config.run, num_epoch=None)), (note,)


def file_settings(path: Path) -> dict[str, Any]:
    """Read and check a configuration file, as settings by path; raises ConfigError naming the file or the key."""
    data = read_yaml_file(path)
    config = from_dict(data)
    checked = {**to_dict(config), SGLANG: check_sglang(config.sglang)}
    return {f"{node}.{leaf}": checked[node][leaf] for node, leaves in data.items() for leaf in leaves}


def chosen_files(groups: Mapping[str, str]) -> DictConfig:
    """Return the settings of the chosen files of conf/, as Hydra composes them, unresolved and without defaults."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra_compose("config", [f"{group}={name}" for group, name in groups.items()])


def laid_over(layers: DictConfig, values: Mapping[str, object]) -> dict[Any, Any]:
    """Lay ``layers`` and ``values`` over the tree's defaults, as plain data, interpolations of layers resolved.

    An interpolation reads the final value of its target; the values in ``values`` are never interpolated.
    """
    merged = OmegaConf.merge(to_dict(Config()), layers)
    for path, value in values.items():
        OmegaConf.update(merged, path, _literal(value), merge=False, force_add=True)
    data = OmegaConf.to_container(merged, resolve=True)
    assert isinstance(data, dict), "conf/config.yaml composes to a mapping"
    data.pop(DRAFTS, None)
    return data


def _literal(value: object) -> object:
    """Escape plain data so that OmegaConf returns it unchanged: a backslash goes before each ``${`` of a text."""
    if isinstance(value, Mapping):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_literal(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", value)
