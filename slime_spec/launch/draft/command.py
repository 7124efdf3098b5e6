"""The command line calls this entry point for ``slime-spec draft ACTION``."""

from __future__ import annotations

from collections.abc import Sequence

from slime_spec.interfaces import unknown_choice
from slime_spec.launch.draft.convert_options import read_convert_options
from slime_spec.launch.draft.eval_options import read_eval_options
from slime_spec.launch.draft.options import read_options


def run_draft(argv: Sequence[str]) -> int:
    """Run an action; raises ConfigError for an unknown action or flag before torch is loaded."""
    action, rest = (argv[0], argv[1:]) if argv else ("", ())
    if action == "convert":
        convert_options = read_convert_options(rest)
        from slime_spec.launch.draft.convert import convert

        return convert(convert_options)
    if action == "eval":
        eval_options = read_eval_options(rest)
        from slime_spec.launch.draft.evaluate import evaluate

        return evaluate(eval_options)
    if action != "train":
        raise unknown_choice("draft", ["convert", "eval", "train"], action)
    options = read_options(rest)
    from slime_spec.launch.draft.train import train

    return train(options, ["slime-spec", "draft", *argv])
