"""slime's --ref-load of a converted checkpoint is --hf-checkpoint itself here, where nothing is converted."""

from __future__ import annotations

from dataclasses import replace

from slime_spec.config.tree import Config

REF_LOAD = "--ref-load"
CONVERTED = "_torch_dist"  # ends the name of what slime's tools convert a checkpoint to
REASON = "nothing is converted, and a KL is to --hf-checkpoint unless --ref-load names a Hugging Face folder"


def is_converted(path: str) -> bool:
    """Return whether a path is slime's name of a converted checkpoint."""
    return path.rstrip("/").endswith(CONVERTED)


def without_converted(config: Config) -> tuple[Config, tuple[str, ...]]:
    """Return the configuration without a reference that slime converted, and a note on it."""
    path = config.trainer.ref_load
    if path is None or not is_converted(path):
        return config, ()
    note = f"No effect, as {REASON}: {REF_LOAD} {path}."
    return replace(config, trainer=replace(config.trainer, ref_load=None)), (note,)
