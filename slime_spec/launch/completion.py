"""``slime-spec completion bash`` prints a script with which the shell completes commands, flags and their choices."""

from __future__ import annotations

from collections.abc import Sequence

from slime_spec.config.schema import settings
from slime_spec.errors import ConfigError
from slime_spec.launch.flags import flags
from slime_spec.launch.groups import EXPERIMENT, choices
from slime_spec.launch.help import DRY_RUN
from slime_spec.sglang.flags import sglang_flags
from slime_spec.suggest import did_you_mean

SHELLS = ("bash", "zsh")
USAGE = """\
slime-spec completion bash|zsh

Prints a script; have your shell read it:
  bash    eval "$(slime-spec completion bash)"     in ~/.bashrc
  zsh     eval "$(slime-spec completion zsh)"      in ~/.zshrc, after compinit"""
# Where nothing is offered, the shell offers files: -o default.
SCRIPT = """\
_slime_spec() {{
    COMPREPLY=()
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    if ((COMP_CWORD == 2)); then
        case "${{COMP_WORDS[1]}}" in
{actions}
        esac
    fi
    case "${{COMP_WORDS[1]}}" in
    {of_train}) ;;
    *) return ;;
    esac
    case "$before" in
{cases}
    esac
    case "$word" in
    -*) COMPREPLY=($(compgen -W "{flags}" -- "$word")) ;;
    esac
}}
complete -o default -F _slime_spec slime-spec
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"
ACTIONS = {"draft": ("train", "eval", "convert"), "models": ("fetch",), "completion": SHELLS}  # words after a command
OF_TRAIN = ("train", "rollout", "config", "doctor", "tune", "eval")  # commands that take train's flags


def completion(argv: Sequence[str], commands: Sequence[str]) -> str:
    """Return what the command prints; raises ConfigError for a shell without a script."""
    if not argv or argv[0] in ("-h", "--help"):
        return USAGE
    if argv[0] not in SHELLS:
        hint = did_you_mean(argv[0], SHELLS)
        rule = f"must be one of {', '.join(SHELLS)}"
        raise ConfigError("completion", rule, argv[0], f"{hint}Pass the name of your shell.")
    script = SCRIPT.format(
        commands=" ".join(commands),
        of_train="|".join(OF_TRAIN),
        cases="\n".join(_cases()),
        actions="\n".join(_branch(command, words, "        ") for command, words in ACTIONS.items()),
        flags=" ".join((*flags(), DRY_RUN)),
    )
    return (ZSH if argv[0] == "zsh" else "") + script.rstrip()


def _cases() -> list[str]:
    """Return a branch for each flag whose values are known."""
    known = {name: setting.choices for setting in settings().values() if setting.choices for name in setting.flags}
    for flag in sglang_flags().values():
        for name in flag.flags if flag.choices else ():
            known.setdefault(f"--sglang-{name[2:]}", tuple(map(str, flag.choices)))
    known["--config"] = choices(EXPERIMENT)
    return [_branch(name, values) for name, values in known.items()]


def _branch(word: str, offered: Sequence[str], indent: str = "    ") -> str:
    return f'{indent}{word}) COMPREPLY=($(compgen -W "{" ".join(offered)}" -- "$word")); return ;;'
