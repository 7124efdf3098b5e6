"""Read the command line as settings: flags and path=value overrides in any order; a setting's last value wins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slime_spec.config.build import unknown_setting
from slime_spec.config.schema import SGLANG, settings
from slime_spec.errors import ConfigError, raise_all
from slime_spec.launch.flags import OVERRIDE, Flag, find_flag, flags, is_flag, parse_value
from slime_spec.launch.groups import EXPERIMENT, GROUPS, check_choice
from slime_spec.launch.newer_flags import newer_flag
from slime_spec.launch.others.names import counterpart_of
from slime_spec.launch.slime.notes import without_effect
from slime_spec.sglang.flags import sglang_flag
from slime_spec.suggest import did_you_mean

EXTRA_ARGS, EXTRA_ARGS_FLAG = "sglang_server.extra_args", "--sglang-extra-args"
DEBUG_MODES = ("--debug-rollout-only", "--debug-train-only")
OWN_REWARD = "--custom-rm-path"
REPEATED = ("--rollout-sample-hook-path",)  # each adds to those before it
REWARD_FLAGS = ("--rm-type", OWN_REWARD)  # two flags of one setting


@dataclass(frozen=True)
class Arguments:
    """Holds a command line's settings: files of conf/ by group (an experiment may be a path), and typed values by path.

    ``of_slime`` are slime's flags that are no settings, by their names; slime_spec.launch.slime knows what they mean.
    ``notes`` say which of the flags have no effect beside others.

    Example: ``Arguments({"experiment": "smollm2-135m"}, {"trainer.lr": 1e-6, "sglang.cuda_graph_bs_decode": (1, 2)})``
    """

    groups: Mapping[str, str]
    settings: Mapping[str, Any]
    of_slime: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """Holds the words of one flag, with its values, or of one path=value; what they set, or what is wrong with them.

    Example: ``Reading(("--no-colocate",), "--colocate", "cluster.colocate", False)``
    """

    words: tuple[str, ...]
    name: str
    path: str = ""
    value: Any = None
    error: ConfigError | None = None


def read_each(argv: Sequence[str]) -> Iterator[Reading]:
    """Read flag after flag; a wrong one does not end the reading."""
    position = 0
    while position < len(argv):
        reading = _read_at(argv, position)
        yield reading
        position += len(reading.words)


def _read_at(argv: Sequence[str], position: int) -> Reading:
    token = argv[position]
    try:
        if not token.startswith("-"):
            path, value = _read_override(token)
            return Reading((token,), path, path, value)
        if not is_flag(token) and (newer := newer_flag(argv, position)):
            return Reading(tuple(argv[position : position + newer.num_tokens]), token, EXTRA_ARGS, newer.words)
        name, flag, value, used = _read_flag(argv, position)
        if (told := without_effect(flag.path)) is not None:
            told.check(name, value)
        return Reading(tuple(argv[position : position + used]), name, flag.path, value)
    except ConfigError as error:
        return Reading((token, *_after_mistake(argv, position)), token.partition("=")[0], error=error)


def _after_mistake(argv: Sequence[str], position: int) -> list[str]:
    """Return the words after a wrong one that belong to it, so that they are not told as further mistakes."""
    token = argv[position]
    if not token.startswith("-") or "=" in token:
        return []
    num_values = find_flag(token)[0].num_values if is_flag(token) else "*"
    return [] if num_values == "0" else _values_after(argv, position + 1, num_values)


def read_arguments(argv: Sequence[str]) -> Arguments:
    """Read the command line; raises ConfigError for unknown flags and keys, wrong types and values, all at once."""
    values: dict[str, Any] = {}
    debug: dict[str, bool] = {}
    servers_own: tuple[str, ...] = ()
    errors: list[ConfigError] = []
    rewards: dict[str, Any] = {}
    for reading in read_each(argv):
        path, value = reading.path, reading.value
        if reading.error is not None:
            errors.append(reading.error)
            continue
        if path == EXTRA_ARGS and reading.name not in (EXTRA_ARGS, EXTRA_ARGS_FLAG):
            servers_own += value
            continue
        if reading.name in DEBUG_MODES:
            on = flags()[reading.name].on
            debug[reading.name] = value == on
            if not debug[reading.name] and values.get(path, on) != on:
                value = values[path]  # a mode that is not chosen is off already
        if reading.name in REPEATED:
            value = (*values.get(path, ()), *value)
        values.pop(path, None)
        values[path] = value
        if reading.name in REWARD_FLAGS:
            rewards[reading.name] = value
    told: tuple[str, ...] = ()
    if len(rewards) > 1:  # as in slime, whatever their order
        values["task.reward"] = rewards[OWN_REWARD]
        told = (f"{OWN_REWARD} {rewards[OWN_REWARD]} is the reward, and --rm-type has no effect.",)
    if all(debug.get(name) for name in DEBUG_MODES):
        rule = "one generates without training, the other the reverse"
        errors.append(ConfigError(" and ".join(DEBUG_MODES), rule, True, "Pass one of them."))
    of_slime = {name: values.pop(name) for name in list(values) if name.startswith("--")}
    raise_all(errors)
    if servers_own:
        values[EXTRA_ARGS] = (*values.get(EXTRA_ARGS, ()), *servers_own)
    chosen = {group: values.pop(group) for group in GROUPS if group in values}
    return Arguments({group: name for group, name in chosen.items() if name is not None}, values, of_slime, told)


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
    if path not in settings() and (theirs := counterpart_of(path)) is not None:
        raise theirs.refusal(path)
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
