"""The command ``slime-spec tune [flags of train] [--draft DRAFT] [--quick]`` measures what speculation pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slime_spec.bench.tune.options import help_text, read_options
from slime_spec.launch.ray_environment import prepare_ray_environment


def run_tune_command(argv: Sequence[str], show: Callable[[str], None]) -> int:
    """Run the command and return its exit code; what Ray reads from the environment is set before Ray is imported."""
    if {"-h", "--help"} & set(argv):
        show(help_text())
        return 0
    options = read_options(argv)
    if options.pushes:
        prepare_ray_environment(joining=options.config.cluster.ray_address is not None)
    from slime_spec.bench.tune.command import run_tune

    return run_tune(options, argv)
