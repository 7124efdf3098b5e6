"""The one door from a command line to a Config: named configuration, file and flags, composed by Hydra and checked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import slime_spec
from slime_spec.config.build import from_dict, read_yaml, to_dict
from slime_spec.config.checks import check, notes
from slime_spec.config.schema import SGLANG, settings
from slime_spec.config.speculation import check_environment, unused_draft_settings
from slime_spec.config.speculative import SpeculativeConfig
from slime_spec.config.suggest import did_you_mean
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.launch.arguments import Arguments, read_arguments
from slime_spec.sglang.flags import check_sglang, sglang_flag


@dataclass(frozen=True)
class Composed:
    """A configuration; ``notes`` say what of it was left out or has no effect, one sentence each.

    ``given`` are the paths of the settings that the command line or its experiment sets; others have their defaults.
    """

    config: Config
    notes: tuple[str, ...]
    given: frozenset[str]


def compose(argv: Sequence[str]) -> Config:
    """The configuration alone; see ``composed``."""
    return composed(argv).config


def composed(argv: Sequence[str]) -> Composed:
    """The configuration that ``argv`` (flags and overrides, without the command's name) describes.

    In rising precedence: the tree's defaults, conf/config.yaml, the chosen experiment or file, the command line.
    Values on the command line and in a file are literal: only conf/ may interpolate (``${model.hf_checkpoint}``).
    Another algorithm than the experiment's leaves out the experiment's draft, but not one from the command line.
    Raises ConfigError, before anything heavy is imported, for whatever cannot be honoured.
    """
    arguments = read_arguments(argv)
    experiment, values = arguments.experiment, arguments.settings
    if experiment is not None and _is_path(experiment):
        values = {**file_settings(Path(experiment)), **values}
        experiment = None
    if experiment is not None and experiment not in experiments():
        raise ConfigError(
            "experiment",
            f"must be a .yaml file or one of {', '.join(experiments())}",
            experiment,
            f"{did_you_mean(experiment, experiments())}Pass --config NAME or --config PATH.yaml.",
        )
    config = from_dict(_composed(Arguments(experiment, values)))
    unused = [name for name in unused_draft_settings(config.speculative) if not _is_given(arguments, name)]
    left_out = (f"speculative.{name} is not used by {config.speculative.algorithm}: left out." for name in unused)
    default = SpeculativeConfig()
    kept = replace(config.speculative, **{name: getattr(default, name) for name in unused})
    config = replace(config, speculative=kept)
    check(config)
    check_environment(os.environ)
    return Composed(config, (*left_out, *notes(config)), frozenset(values) | _set_by(experiment))


def _set_by(experiment: str | None) -> frozenset[str]:
    """The paths of the settings that a named experiment sets."""
    if experiment is None:
        return frozenset()
    data = read_yaml((conf_dir() / "experiment" / f"{experiment}.yaml").read_text())
    return frozenset(f"{node}.{leaf}" for node, leaves in data.items() for leaf in leaves)


def _is_given(arguments: Arguments, name: str) -> bool:
    """Whether the command line itself sets this of the speculative settings."""
    return f"speculative.{name}" in arguments.settings


def conf_dir() -> Path:
    """The shipped conf/: inside the package once installed, beside it in a checkout."""
    package = Path(slime_spec.__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def experiments() -> list[str]:
    """The names that ``--config`` knows."""
    return sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))


def file_settings(path: Path) -> dict[str, Any]:
    """Every setting of a configuration file by its path, checked; raises ConfigError naming the file or the key."""
    try:
        data = read_yaml(path.read_text())
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        rule = f"must be a readable YAML file: {error}"
        raise ConfigError("--config", rule, str(path), "Write one with: slime-spec config > PATH.yaml") from None
    from_dict(data)  # for its errors: unknown keys, wrong types
    return {
        f"{node}.{leaf}": _typed(f"{node}.{leaf}", value)
        for node, leaves in data.items()
        for leaf, value in leaves.items()
    }


def _typed(path: str, value: object) -> Any:
    node, _, leaf = path.partition(".")
    return sglang_flag(leaf).check(value) if node == SGLANG else settings()[path].check(value)


def _is_path(experiment: str) -> bool:
    return experiment.endswith((".yaml", ".yml")) or "/" in experiment


def _composed(arguments: Arguments) -> Mapping[str, object]:
    """The nested plain data of all layers, with interpolations resolved."""
    ConfigStore.instance().store(name="tree", node=to_dict(Config()))
    overrides = [f"experiment={arguments.experiment}"] if arguments.experiment else []
    sglang = {
        path.partition(".")[2]: value for path, value in arguments.settings.items() if path.startswith(f"{SGLANG}.")
    }
    overrides += [
        f"{path}={override_value(value)}"
        for path, value in arguments.settings.items()
        if not path.startswith(f"{SGLANG}.")
    ]
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            data = OmegaConf.to_container(hydra_compose("config", overrides), resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(
            "conf", f"must compose: {error}", arguments.experiment, "Correct the file in conf/."
        ) from None
    assert isinstance(data, dict), "conf/config.yaml composes to a mapping"
    # SGLang's own flags are not in the tree, so Hydra cannot know them: they are laid over its result.
    return {**data, SGLANG: check_sglang({**data[SGLANG], **sglang})}


def override_value(value: object) -> str:
    """A typed value in Hydra's override grammar, such that it comes back equal whatever its text contains."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{','.join(override_value(item) for item in value)}]"
    if not isinstance(value, str):
        return repr(value)
    # OmegaConf reads ${ as an interpolation unless a backslash precedes it; Hydra's quotes end at a bare quote.
    literal = re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", value)
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), literal) + "'"
