"""The flag ``--wandb-key`` of slime goes into the environment, where wandb looks, and into no file of the run."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

from slime_spec.errors import ConfigError

FLAG, VARIABLE = "--wandb-key", "WANDB_API_KEY"


def without_wandb_key(argv: Sequence[str], environment: MutableMapping[str, str]) -> list[str]:
    """Return the command line without the key, which the environment has then; raises ConfigError without a value.

    The run's folder keeps the command line, and wandb the settings: a key in either could be read by others.
    """
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != FLAG:
            kept.append(word)
            continue
        key = value if equals else next(words, "")
        if not key or key.startswith("-"):
            raise ConfigError(FLAG, "needs a key", None, f"Pass a key, or leave {FLAG} out and set {VARIABLE}.")
        environment[VARIABLE] = key
    return kept
