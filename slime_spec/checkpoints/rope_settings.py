"""This module reads the rotary position embedding out of a config.json, whichever of its places the file uses.

transformers 5 writes ``rope_parameters``, older versions ``rope_theta`` and ``rope_scaling``. Readers prefer one place
or another where two disagree, so that a file in which they disagree is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime_spec.checkpoints.config_keys import (
    CORRECT,
    Keys,
    check_keys,
    entries,
    harmless,
    only,
    real,
    shown,
    text,
    whole,
)
from slime_spec.errors import CheckpointError

DEFAULT_THETA = 10000.0
LLAMA3, YARN, MROPE = "llama3", "yarn", "mrope"
DEFAULT_KINDS = ("default", LLAMA3)
OF_OTHER_KINDS = harmless("read for the kinds of scaling that are refused")
# Keys of config.json, and those within its rope_scaling or rope_parameters.
ROPE_KEYS: Keys = {
    "rope_theta": real(1, 1e15),
    "rope_scaling": entries(),
    "rope_parameters": entries(),
    "partial_rotary_factor": only(1),
    "rotary_pct": only(1),
    "original_max_position_embeddings": whole(),
}
NESTED_KEYS: Keys = {
    "rope_theta": real(1, 1e15),
    "rope_type": text(),
    "type": text(),
    "partial_rotary_factor": only(1),
    "factor": real(1e-3, 1e6),
    "low_freq_factor": real(1e-6, 1e6),
    "high_freq_factor": real(1e-6, 1e6),
    "original_max_position_embeddings": whole(),
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor"), OF_OTHER_KINDS),
    # Kinds of layers, each with an embedding of its own.
    **dict.fromkeys(("full_attention", "sliding_attention", "linear_attention"), only()),
}


YARN_KEYS: Keys = {
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), real(0, 1e3)),
    **dict.fromkeys(("beta_fast", "beta_slow"), real(1e-3, 1e6)),
    "truncate": only(True),
}


@dataclass(frozen=True)
class RopeScaling:
    """Holds the factors of Llama-3.1's frequency scaling (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def as_config(self) -> dict[str, Any]:
        """Return the ``rope_scaling`` of a config.json."""
        return {"rope_type": LLAMA3, **vars(self)}


@dataclass(frozen=True)
class Yarn:
    """Holds the parameters of YaRN (arXiv 2309.00071, ``rope_type: yarn``) as transformers reads them.

    Angles that turn fewer than ``beta_slow`` times within the original context are slowed by ``factor``, those beyond
    ``beta_fast`` kept. ``magnitude`` multiplies cosines and sines, ``score_factor`` the attention's scores.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int
    magnitude: float = 1.0
    score_factor: float = 1.0

    def as_config(self) -> dict[str, Any]:
        """Return the ``rope_scaling`` of a config.json of grouped-query attention, which reads no ``score_factor``."""
        kept = {name: value for name, value in vars(self).items() if name not in ("magnitude", "score_factor")}
        return {"rope_type": YARN, **kept, "attention_factor": self.magnitude}


def as_read_for_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``config`` as it is for tokens of text: a rotation by three axes of positions, which are one there."""
    changed = {}
    for place in ("rope_scaling", "rope_parameters"):
        rope = config.get(place)
        if isinstance(rope, dict) and any(rope.get(name) == MROPE for name in ("rope_type", "type")):
            kept = {name: value for name, value in rope.items() if name not in ("type", "mrope_section")}
            changed[place] = {**kept, "rope_type": "default"}
    return {**config, **changed} if changed else config


def read_rope(
    config: Mapping[str, Any], source: str, kinds: tuple[str, ...] = DEFAULT_KINDS, share: float = 1
) -> tuple[float, RopeScaling | Yarn | None]:
    """Return the base of the angles and their scaling; raises CheckpointError naming the key that stands against it.

    ``kinds`` are the scalings that the family's decoder computes, ``share`` what it rotates of a head.
    """
    of_share = {"partial_rotary_factor": only(share), "rotary_pct": only(share)}
    check_keys(config, {**ROPE_KEYS, **of_share}, source)
    scaling, parameters = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    if scaling and parameters and scaling != parameters:
        raise _disagreeing(f"{source}: rope_scaling", "rope_parameters", shown(scaling))
    rope, place = (scaling, "rope_scaling.") if scaling else (parameters, "rope_parameters.")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    nested = {**NESTED_KEYS, "rope_type": only(*kinds), "partial_rotary_factor": only(share)}
    check_keys({**rope, "rope_type": kind}, {**nested, **(YARN_KEYS if kind == YARN else {})}, source, place)
    thetas = [each for each in (rope.get("rope_theta"), config.get("rope_theta")) if each is not None]
    if len(set(thetas)) > 1:
        raise _disagreeing(f"{source}: rope_theta", f"{place}rope_theta", thetas[1])
    theta = float(thetas[0]) if thetas else DEFAULT_THETA
    if kind == LLAMA3:
        return theta, _llama3(config, rope, f"{source}: {place}")
    return theta, _yarn(config, rope, f"{source}: {place}") if kind == YARN else None


def _yarn(config: Mapping[str, Any], rope: Mapping[str, Any], prefix: str) -> Yarn:
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if original is None:
        rule = "must be given for yarn"
        raise CheckpointError(f"{prefix}original_max_position_embeddings", rule, None, CORRECT)
    factor = float(config["max_position_embeddings"] / original if factor is None else factor)
    fast, slow = float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1)
    if slow >= fast:
        raise CheckpointError(f"{prefix}beta_slow", f"must be less than beta_fast ({fast:g})", slow, CORRECT)
    mscale, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    magnitude = rope.get("attention_factor")
    if magnitude is None:
        magnitude = _mscale(factor, mscale) / _mscale(factor, of_all) if mscale and of_all else _mscale(factor, 1.0)
    score_factor = _mscale(factor, of_all) ** 2 if of_all else 1.0
    return Yarn(factor, fast, slow, original, float(magnitude), score_factor)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(config: Mapping[str, Any], rope: Mapping[str, Any], prefix: str) -> RopeScaling:
    # transformers takes the length of a file that has it outside before the one within, and else the whole context.
    own, outside = rope.get("original_max_position_embeddings"), config.get("original_max_position_embeddings")
    if own is not None and outside is not None and own != outside:
        raise _disagreeing(f"{prefix}original_max_position_embeddings", "the one outside", own)
    names = ("factor", "low_freq_factor", "high_freq_factor")
    if absent := [name for name in names if rope.get(name) is None]:
        raise CheckpointError(f"{prefix}{absent[0]}", "must be given for llama3", None, CORRECT)
    factor, low, high = (float(rope[name]) for name in names)
    if low >= high:
        raise CheckpointError(f"{prefix}low_freq_factor", f"must be less than high_freq_factor ({high})", low, CORRECT)
    return RopeScaling(factor, low, high, own or outside or config["max_position_embeddings"])


def _disagreeing(setting: str, other: str, value: object) -> CheckpointError:
    return CheckpointError(setting, f"must be the same as {other}, or left out", value, CORRECT)
