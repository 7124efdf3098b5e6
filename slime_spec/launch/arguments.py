"""Read the command line as settings: flags and path=value overrides in any order; a setting's last value wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slime_spec.config.build import unknown_setting
from slime_spec.config.schema import SGLANG, settings
from slime_spec.errors import ConfigError
from slime_spec.launch.flags import ONE_VALUE, OVERRIDE, Flag, find_flag, flags, is_flag, parse_value
from slime_spec.launch.groups import EXPERIMENT, GROUPS, check_choice
from slime_spec.launch.newer_flags import newer_flag
from slime_spec.sglang.flags import sglang_flag
from slime_spec.suggest import did_you_mean

EXTRA_ARGS = "sglang_server.extra_args"
DEBUG_MODES = ("--debug-rollout-only", "--debug-train-only")


@dataclass(frozen=True)
class Arguments:
    """Holds a command line's settings: files of conf/ by group (an experiment may be a path), and typed values by path.

    Example: ``Arguments({"experiment": "smollm2-135m"}, {"trainer.lr": 1e-6, "sglang.cuda_graph_bs_decode": (1, 2)})``
    """

    groups: Mapping[str, str]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def read_arguments(argv: Sequence[str]) -> Arguments:
    """Read the command line; raises ConfigError for an unknown flag or key, a wrong type, a value out of range."""
    values: dict[str, Any] = {}
    debug: dict[str, bool] = {}
    servers_own: tuple[str, ...] = ()
    position = 0
    while position < len(argv):
        token = argv[position]
        if token.startswith("-") and not is_flag(token) and (newer := newer_flag(argv, position)):
            servers_own += newer.words
            position += newer.num_tokens
            continue
        if token.startswith("-"):
            name, flag, value, used = _read_flag(argv, position)
            path = flag.path
            if name in DEBUG_MODES:
                debug[name] = value == flag.on
                if not debug[name] and values.get(path, flag.on) != flag.on:
                    value = values[path]  # a mode that is not chosen is off already
        else:
            path, value = _read_override(token)
            used = 1
        values.pop(path, None)
        values[path] = value
        position += used
    if all(debug.get(name) for name in DEBUG_MODES):
        raise ConfigError(
            " and ".join(DEBUG_MODES),
            "one generates without training, the other the reverse",
            True,
            "Pass one of them.",
        )
    if servers_own:
        values[EXTRA_ARGS] = (*values.get(EXTRA_ARGS, ()), *servers_own)
    chosen = {group: values.pop(group) for group in GROUPS if group in values}
    notes = tuple(values.pop(name) for name in ONE_VALUE if name in values)
    return Arguments({group: name for group, name in chosen.items() if name is not None}, values, notes)


def _read_flag(argv: Sequence[str], position: int) -> tuple[str, Flag, Any, int]:
    """Return the flag at ``position``: its plain spelling, the flag, its value, and the number of tokens read."""
    spelled, has_value, attached = argv[position].partition("=")
    name = spelled.replace("_", "-")
    flag, is_on = find_flag(spelled)
    if flag.num_values == "0":
        plain = name if is_on else name.replace("no-", "", 1)
        if not has_value:
            return plain, flag, flag.on if is_on else flag.off, 1
        if not is_on:
            raise ConfigError(name, "takes no value", attached, f"Write {plain}={attached} or {name} alone.")
        return plain, flag, _converted(flag, name, [attached]), 1
    if has_value:
        return name, flag, _converted(flag, name, [attached]), 1
    texts = _values_after(argv, position + 1, flag.num_values)
    if not texts and flag.num_values in "1+":
        raise ConfigError(
            name, "needs a value", None, f"Write {name} VALUE, or {name}=VALUE for one that begins with --."
        )
    return name, flag, _converted(flag, name, texts), 1 + len(texts)


def _converted(flag: Flag, name: str, texts: Sequence[str]) -> Any:
    try:
        return flag.convert(texts)
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(name, "must be true or false", texts[0], f"Write {name} alone, or {name}=false.") from None


def _values_after(argv: Sequence[str], start: int, num_values: str) -> list[str]:
    """Return the flag's values from ``start`` on, up to the next flag, or to an override where the list may end."""
    texts: list[str] = []
    for token in argv[start:]:
        if token.startswith("--") or (num_values in "1?" and texts) or (num_values != "1" and OVERRIDE.match(token)):
            break
        texts.append(token)
    return texts


def _read_override(token: str) -> tuple[str, Any]:
    path, equals, text = token.partition("=")
    if not equals:
        known = [*flags(), *settings()]
        raise ConfigError(token, "is neither a --flag nor a path=value", token, did_you_mean(token, known) + _SPELLINGS)
    if path[:1] in ("+", "~"):
        raise ConfigError(token, "the tree is closed: nothing is added to it or taken away", token, _SPELLINGS)
    if path in GROUPS:
        return path, None if (path, text) == (EXPERIMENT, "null") else check_choice(path, text)
    node, _, leaf = path.partition(".")
    if node == SGLANG and leaf:
        entry = sglang_flag(leaf)
        if entry.is_list and text.startswith("["):
            return path, entry.check(list_of(path, text))
        return path, entry.parse([unquoted(text)])
    if path not in settings():
        raise unknown_setting(path)
    setting = settings()[path]
    if setting.is_tuple and text.startswith("["):
        return path, setting.check(list_of(path, text))
    plain = unquoted(text)
    if setting.is_tuple:
        return path, setting.check([parse_value(setting, plain)])
    # In path=value, null in quotes is the text "null"; null without quotes is no value.
    return path, setting.check(plain if plain != text and setting.type is str else parse_value(setting, plain))


_SPELLINGS = "Write a setting as trainer.lr=1e-6 or --lr 1e-6."


def unquoted(text: str) -> str:
    """Remove one pair of quotes around a whole value, as Hydra does."""
    whole = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1].replace(f"\\{text[0]}", text[0]) if whole else text


def list_of(path: str, text: str) -> list[Any]:
    """Read a list in Hydra's grammar: ``[add10, "max 4"]``."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        value = OverridesParser.create().parse_override(f"{path}={text}").value()
    except (HydraException, RecursionError):
        raise ConfigError(path, "must be a list", text, f"Write {path}=[A,B], with quotes around texts.") from None
    if not isinstance(value, list):
        raise ConfigError(path, "must be one list", text, f"Write {path}=[A,B].")
    return value
