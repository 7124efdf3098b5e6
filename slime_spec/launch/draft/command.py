"""The command line calls this entry point for ``slime-spec draft ACTION``."""

from __future__ import annotations

from collections.abc import Sequence

from slime_spec.launch.draft.options import read_action, read_options


def run_draft(argv: Sequence[str]) -> int:
    """Run an action; raises ConfigError for an unknown action or flag before torch is loaded."""
    options = read_options(read_action(argv))
    from slime_spec.launch.draft.train import train

    return train(options, ["slime-spec", "draft", *argv])
