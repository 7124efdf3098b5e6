"""The command ``slime-spec`` runs subcommands, prints help, and shows an error as a block without a traceback."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from slime_spec import __version__
from slime_spec.columns import columns, fitted
from slime_spec.errors import ConfigError, ConfigErrors, RewardError
from slime_spec.garbage import no_collection
from slime_spec.launch.help import BENCH, COMMANDS, CONFIG, DRY_RUN, draft_help, train_help
from slime_spec.namesakes import check_namesakes
from slime_spec.suggest import did_you_mean

HELP = (["-h"], ["--help"])
HELP_FLAGS = frozenset({"-h", "--help"})
INTERRUPTED = 130  # as a shell reports Ctrl-C

# A command imports its modules only when it is chosen, so that `slime-spec config` is fast.


class StderrHandler(logging.StreamHandler):
    """Logs to the current sys.stderr, which a progress display replaces to print lines above its bars.

    ``width`` are the columns at which a line is wrapped: a run's log has it in one piece. Tracebacks are left alone.
    """

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self._width = width

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if self._width is None or record.exc_info else fitted(text, self._width)

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "is_shown", False):
            return
        self.setStream(sys.stderr)
        super().emit(record)


def _log_to_terminal(width: int | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", handlers=[StderrHandler(width)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0 on success, 2 for a mistake in the command line or configuration, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own rewards and tasks lie there; last, so that they hide no library
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _show(COMMANDS)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        _show(f"slime_spec {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    try:
        check_namesakes()
        if command not in HANDLERS:
            hint = did_you_mean(command, (*HANDLERS, "--version"))
            rule = f"must be one of {', '.join(HANDLERS)}"
            raise ConfigError("command", rule, command, f"{hint}Choose one of these.\n\n{COMMANDS}")
        return HANDLERS[command](rest)
    except ConfigError as error:
        print(error_block(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # a run ends itself in order; this is any other command, or the time before a run
        return INTERRUPTED
    except RewardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def error_block(error: ConfigError) -> str:
    """Format the four facts of a ConfigError, one per line; a fact that is a list begins below its name.

    Several errors have a line each. A rule in words is wrapped; paths and commands stay whole, for those who copy them.
    """
    if isinstance(error, ConfigErrors):
        return f"error: {error}"
    facts = {"rule": error.rule, "value": repr(error.value), "remedy": error.remedy.strip(" ").rstrip()}
    lines = [
        f"  {f'{name}:':8}{text}" if not text.startswith("\n") else f"  {name}:{text}" for name, text in facts.items()
    ]
    if not {"\n", "/"} & set(error.rule):
        lines[0] = fitted(lines[0], indent=" " * 10)
    return "\n".join([f"error: {error.setting}", *lines])


def _train(argv: list[str]) -> int:
    if HELP_FLAGS & set(argv):
        _show(train_help())
        return 0
    from slime_spec.launch.compose import composed

    is_dry = DRY_RUN in argv
    argv = _without_wandb_key([word for word in argv if word != DRY_RUN])
    made = composed(argv)
    _tell(made.notes)
    if is_dry:
        from slime_spec.launch.dry_run.plan import make_plan
        from slime_spec.launch.dry_run.show import show_plan
        from slime_spec.launch.preflight import look

        with closing(look(made)) as looked:
            plan = make_plan(looked)
        show_plan(plan)
        return 2 if plan.stopping else 0
    _log_to_terminal(columns())
    with no_collection():
        from slime_spec.launch.train import run

    return run(made, [sys.executable, "-m", "slime_spec", "train", *argv])


def _without_wandb_key(argv: list[str]) -> list[str]:
    """Return the words without slime's --wandb-key: the run's files keep its command line; wandb reads a variable."""
    from slime_spec.launch.arguments import read_each
    from slime_spec.launch.slime.without_effect import WANDB_KEY

    readings = list(read_each(argv))
    for key in (each.value[0] for each in readings if each.path == WANDB_KEY and any(each.value)):
        os.environ["WANDB_API_KEY"] = key
        _tell([f"{WANDB_KEY} is handed on as WANDB_API_KEY. Set that instead: others can read a command line."])
    return [word for each in readings if each.path != WANDB_KEY for word in each.words]


def _rollout(argv: list[str]) -> int:
    if HELP_FLAGS & set(argv):
        _show(train_help("rollout"))
        return 0
    return _train(["--debug-rollout-only", "--save-samples", *argv])


def _config(argv: list[str]) -> int:
    if HELP_FLAGS & set(argv):
        _show(CONFIG)
        return 0
    from slime_spec.config.build import to_yaml
    from slime_spec.launch.compose import composed

    made = composed(argv)
    _show(to_yaml(made.config).rstrip())
    _tell(made.notes)
    return 0


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _show(text: str) -> None:
    """Print to a reader that may close early (``slime-spec train --help | head``)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains again


def _models(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="slime-spec models", description="Make a model's checkpoint folder.")
    parser.add_argument("action", choices=["fetch"])
    parser.add_argument("name", help="smollm2-135m")
    parser.add_argument("--output", type=Path, help="the folder to make (default: models/NAME)")
    options = parser.parse_args(argv)
    from slime_spec.checkpoints.fetch import fetch

    print(fetch(options.name, options.output))
    return 0


def _serve(argv: list[str]) -> int:
    from slime_spec.launch.serve import read_serve_arguments, run_serve

    arguments = read_serve_arguments(argv)
    _tell(arguments.notes)
    _log_to_terminal()
    return run_serve(arguments, _show)


def _eval(argv: list[str]) -> int:
    from slime_spec.launch.eval_arguments import eval_parser, read_eval_arguments

    if argv[:1] in HELP:
        _show(eval_parser().format_help().rstrip())
        return 0
    from slime_spec.launch.evaluate import engines_folder, run_eval

    with engines_folder() as folder:
        arguments = read_eval_arguments(_without_wandb_key(argv), folder)
        _tell(arguments.made.notes)
        _log_to_terminal(columns())
        return run_eval(arguments, folder)


def _draft(argv: list[str]) -> int:
    if argv[:1] in HELP:
        _show(draft_help())
        return 0
    from slime_spec.launch.draft.command import run_draft

    return run_draft(argv)


def _doctor(argv: list[str]) -> int:
    from slime_spec.launch.doctor import run_doctor

    return run_doctor(argv, _show)


def _report(argv: list[str]) -> int:
    from slime_spec.launch.report import run_report

    return run_report(argv, _show)


def _tune(argv: list[str]) -> int:
    from slime_spec.launch.tune import run_tune_command

    return run_tune_command(_without_wandb_key(argv), _show)


def _port(argv: list[str]) -> int:
    from slime_spec.launch.port.command import run_port

    return run_port(argv, _show, lambda text: print(text, file=sys.stderr), _train)


def _completion(argv: list[str]) -> int:
    from slime_spec.launch.completion import completion

    _show(completion(argv, (*HANDLERS, "--help")))
    return 0


def _bench(argv: list[str]) -> int:
    if argv[:1] in HELP:
        _show(BENCH)
        return 0
    if not argv or argv[0].startswith("-"):
        remedy = (
            "Write slime-spec bench main-job, bench engine, bench device, bench sglang, bench pays, "
            "bench drafts, bench coordinator or bench robustness."
        )
        raise ConfigError("bench", "needs the name of a benchmark", argv, remedy)
    from slime_spec.bench import run_bench

    return run_bench(argv[0], argv[1:])


HANDLERS: Mapping[str, Callable[[list[str]], int]] = {
    "train": _train,
    "rollout": _rollout,
    "eval": _eval,
    "config": _config,
    "doctor": _doctor,
    "tune": _tune,
    "report": _report,
    "models": _models,
    "port": _port,
    "bench": _bench,
    "draft": _draft,
    "serve": _serve,
    "completion": _completion,
}
