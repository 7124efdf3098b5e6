"""Read the command line of ``slime-spec tune``: its own flags, and flags of train for everything else."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from slime_spec.algorithms import CONTROLLED_CHAIN
from slime_spec.config.tree import Config
from slime_spec.engines import kind_of
from slime_spec.errors import ConfigError
from slime_spec.launch.compose import composed
from slime_spec.launch.flags import is_flag
from slime_spec.placement import num_engine_nodes
from slime_spec.suggest import did_you_mean

PROG = "slime-spec tune"
MOST_ACCEPTED = float(CONTROLLED_CHAIN[2])  # tokens of a round of the longest chain that the engine drafts
USUAL_BATCHES = (1, 4, 16)
DESCRIPTION = """\
Measure what speculation pays with your checkpoint, drafts and prompts, on the run's own engine: acceptance by position,
the draft length by formula and by measurement, the speed-up by batch, and one push from the trainer to an engine.
Prints the flags to use, or why not to speculate. With --rollout-engine sglang a server is started for each setting in
turn. Every other flag is one of train's: --config, --hf-checkpoint, --prompt-data, --sglang-dtype, ..."""


@dataclass(frozen=True)
class TuneOptions:
    """Holds the command's options; ``config`` is the run that is tuned, as flags of train describe it.

    ``given`` are the paths of the settings that somebody has set, and ``may_lack`` is Composed's. ``seconds`` bounds
    the repetitions at all batch sizes together; acceptance, the starts of servers and the push come on top.
    """

    config: Config
    drafts: tuple[str, ...] = ()
    prompts: Path | None = None
    prompt_key: str = "prompt"
    batch_sizes: tuple[int, ...] = USUAL_BATCHES
    num_new_tokens: int = 64
    num_rounds: int = 3
    seconds: float = 150.0
    threads: int = 1
    assumed_lengths: tuple[float, ...] = ()
    pushes: bool = True
    json: Path | None = None
    chart: Path | None = None
    given: frozenset[str] = frozenset()
    may_lack: frozenset[str] = frozenset()
    is_quick: bool = False


OWN = (
    *("--draft", "--prompts", "--prompt-key", "--batch-sizes", "--new-tokens", "--rounds", "--seconds", "--quick"),
    *("--threads", "--assume-accept", "--no-push", "--json", "--chart"),
)
QUICK = {"num_new_tokens": 24, "num_rounds": 2, "seconds": 30.0}


def read_options(argv: Sequence[str]) -> TuneOptions:
    """Return the options; raises ConfigError, before anything heavy, for what cannot be measured."""
    given, of_train = _parser().parse_known_args([*argv])
    _check_spelling(of_train)
    made = composed(of_train)
    config = made.config
    _check_engine(config)
    options = TuneOptions(
        config=config,
        drafts=tuple(given.draft),
        prompts=given.prompts,
        prompt_key=given.prompt_key,
        assumed_lengths=tuple(given.assume_accept),
        pushes=not given.no_push and config.run.mode != "rollout_only",
        json=given.json,
        chart=given.chart,
        given=made.given,
        may_lack=made.may_lack,
        is_quick=given.quick,
    )
    named = {name: getattr(given, name) for name in (*QUICK, "threads")}
    chosen = (QUICK if given.quick else {}) | {name: value for name, value in named.items() if value is not None}
    options = replace(options, **chosen)
    options = replace(options, batch_sizes=_batch_sizes(given.batch_sizes, config, given.quick))
    _check(options)
    return options


def help_text() -> str:
    return _parser().format_help().rstrip()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROG,
        description=DESCRIPTION,
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = TuneOptions(config=Config())
    parser.add_argument(
        "--draft",
        action="append",
        default=[],
        metavar="DRAFT",
        help="a draft's folder, or builtin:NAME; may be repeated",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="PATH",
        help="a run's folder, its samples.jsonl, or a jsonl (default: the task's)",
    )
    parser.add_argument(
        "--prompt-key", default=defaults.prompt_key, metavar="KEY", help=f"of a jsonl's prompts ({defaults.prompt_key})"
    )
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", metavar="N", help="sequences at once (1, 4, 16 and a whole rollout's)"
    )
    parser.add_argument(
        "--new-tokens",
        dest="num_new_tokens",
        type=int,
        metavar="N",
        help=f"cut replies here, and at rollout.max_response_len ({defaults.num_new_tokens})",
    )
    parser.add_argument(
        "--rounds", dest="num_rounds", type=int, metavar="N", help=f"repetitions ({defaults.num_rounds})"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help=f"bounds the repetitions, of which there are two at least ({defaults.seconds:g})",
    )
    parser.add_argument("--quick", action="store_true", help="fewer batches, tokens and repetitions: about a minute")
    parser.add_argument(
        "--threads", type=int, metavar="N", help=f"compute threads of the embedded engine ({defaults.threads})"
    )
    parser.add_argument(
        "--assume-accept",
        type=float,
        nargs="+",
        default=[],
        metavar="L",
        help="what a draft would pay whose longest chains bring so many tokens a round; nothing is generated by it",
    )
    parser.add_argument("--no-push", action="store_true", help="send no push, as with --debug-rollout-only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw speed-ups and acceptance here, as SVG")
    return parser


class _Parser(argparse.ArgumentParser):
    """Parses with argparse, whose complaints become ConfigErrors, as everywhere on this command line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(self.prog, message, None, f"See {self.prog} --help.")


def _check_spelling(of_train: Sequence[str]) -> None:
    """Refuse a word that is no flag of train but nearly one of the command's own."""
    for word in of_train:
        name = word.partition("=")[0]
        if name.startswith("--") and not is_flag(name) and (hint := did_you_mean(name, OWN)):
            raise ConfigError(name, "is neither a flag of this command nor of train", word, f"{hint}See {PROG} --help.")


def _check_engine(config: Config) -> None:
    kind = kind_of(config)
    if not (kind.has_servers or kind.runs_built_decoders):
        raise ConfigError(
            "rollout.engine",
            f"{PROG} measures an engine that generates: embedded or sglang",
            config.rollout.engine,
            "Drop --rollout-engine, or pass --rollout-engine sglang.",
        )
    if kind.uses_external_servers(config):
        raise ConfigError(
            "sglang_server.external_addrs",
            f"{PROG} starts servers of its own, one for each setting",
            config.sglang_server.external_addrs,
            "Drop --rollout-external-engine-addrs; a finished run's acceptance is judged by slime-spec doctor "
            "--metrics RUN.",
        )
    if num_engine_nodes(config) > 1:
        raise ConfigError(
            "rollout.num_gpus_per_engine",
            f"{PROG} starts servers on this machine alone",
            config.rollout.num_gpus_per_engine,
            "Pass --rollout-num-gpus-per-engine with as many GPUs as this machine has (--num-gpus-per-node).",
        )


def _batch_sizes(given: Sequence[int] | None, config: Config, is_quick: bool) -> tuple[int, ...]:
    if given is not None:
        return tuple(sorted(set(given)))
    rollout = config.rollout
    whole = min(rollout.batch_size * rollout.n_samples_per_prompt, config.engine.max_running_requests)
    usual = USUAL_BATCHES[:2] if is_quick else USUAL_BATCHES
    return tuple(sorted({*(size for size in usual if size < whole), whole}))


def _check(options: TuneOptions) -> None:
    counts = (
        ("--new-tokens", options.num_new_tokens, 8),
        ("--rounds", options.num_rounds, 2),
        ("--seconds", options.seconds, 1),
        ("--threads", options.threads, 1),
        *(("--batch-sizes", size, 1) for size in options.batch_sizes),
    )
    for flag, value, least in counts:
        if value < least:
            raise ConfigError(flag, f"must be at least {least}", value, f"Pass {flag} {least} or more.")
    for length in options.assumed_lengths:
        if not 1.0 < length <= MOST_ACCEPTED:
            rule = f"must be above 1 and at most {MOST_ACCEPTED:g}, the tokens of the longest chain's round"
            raise ConfigError("--assume-accept", rule, length, "Pass lengths such as --assume-accept 2.5 3.3 5.")
    for flag, file in (("--json", options.json), ("--chart", options.chart)):
        if file is not None and not file.parent.is_dir():
            raise ConfigError(flag, "must lie in a folder that is there", str(file), f"Make {file.parent} first.")
