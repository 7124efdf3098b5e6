"""Check that drafts of a draft that no longer fits its target are refused, and accepted again after a push.

    a trained draft    the draft is moved away and back; then the target is
    STANDALONE         the target moves, and its draft, until then the same model, follows it

A moved target may be easier to draft for than before (it repeats words): there a trained draft's acceptance is
reported without a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from slime_spec.algorithms import STANDALONE
from slime_spec.bench.prompts import in_domain
from slime_spec.bench.rows import BenchOptions, Row, at_least, at_most
from slime_spec.bench.sglang.replies import LENGTH, Samples, accept_length, accepted_per_round
from slime_spec.bench.sglang.servers import started
from slime_spec.bench.sglang.settings import drafting, engine_settings
from slime_spec.bench.sglang.weights import Weights, disturbed, draft_weights, target_weights
from slime_spec.checkpoints.end_of_text import end_token_ids
from slime_spec.weights.messages import Side

# Bounds of the drafts accepted per round, relative to the checkpoints' weights.
MOST_WHEN_STALE, LEAST_WHEN_BACK = 0.5, 0.8
TARGET_MOVES, DRAFT_MOVES = 0.15, 1.0  # share of each weight that changes; the target must still write sentences


@dataclass(frozen=True)
class Move:
    """Describes a push and its effect on acceptance: a fitting draft is accepted as at first, a stale draft is not."""

    name: str
    weights: Weights
    side: Side
    leaves: Literal["fitting", "stale", "unknown"]


def measure(options: BenchOptions) -> list[Row]:
    algorithm = drafting(options)
    rows = [] if algorithm == STANDALONE.name else _rows(options, algorithm)
    return rows + (_rows(options, STANDALONE.name) if STANDALONE.name in options.algorithms else [])


def _rows(options: BenchOptions, algorithm: str) -> list[Row]:
    """Measure on questions of the shipped draft's task; replies end where the model ends them."""
    prompts = in_domain(options.model, options.num_prompts, options.seeds[0])
    stops = tuple(end_token_ids(options.model))
    with TemporaryDirectory(prefix="slime-spec-bench-") as log:
        config = engine_settings(options, algorithm, prompts, len(prompts), Path(log))
        moves = moves_of(algorithm, target_weights(config), draft_weights(config), options.seeds[0])
        with started(config) as server:
            fresh = server.greedy(prompts, options.num_new_tokens, stops)
            moved = []
            for move in moves:
                server.push(move.weights, move.side)
                moved.append(server.greedy(prompts, options.num_new_tokens, stops))
    return acceptance_rows(algorithm, fresh, moves, moved)


def moves_of(algorithm: str, target: Weights, draft: Weights, seed: int) -> list[Move]:
    away = disturbed(target, TARGET_MOVES, seed)
    if algorithm == STANDALONE.name:
        return [Move("target_moved", away, "target", "stale"), Move("draft_followed", away, "draft", "fitting")]
    return [
        Move("draft_moved", disturbed(draft, DRAFT_MOVES, seed), "draft", "stale"),
        Move("draft_back", draft, "draft", "fitting"),
        Move("target_moved", away, "target", "unknown"),
        Move("target_back", target, "target", "fitting"),
    ]


def acceptance_rows(algorithm: str, fresh: Samples, moves: Sequence[Move], moved: Sequence[Samples]) -> list[Row]:
    """Return the accept length after every push, and drafts accepted per round over those at first."""
    prefix, words = f"stale.{algorithm.lower()}", f"{algorithm}: reply tokens over verify rounds"
    rows = [Row(f"{prefix}.fresh.accept_length", f"{words}, nothing pushed", accept_length(fresh), LENGTH)]
    for move, samples in zip(moves, moved, strict=True):
        where = f"{prefix}.{move.name}"
        after = f"after a push: {move.name.replace('_', ' ')}"
        rows.append(Row(f"{where}.accept_length", f"{words}, {after}", accept_length(samples), LENGTH))
        what = f"{algorithm}: accepted drafts per round {after}, over those at first"
        share = accepted_per_round(samples) / accepted_per_round(fresh)
        if move.leaves == "fitting":
            rows.append(at_least(f"{where}.share", what, share, "x", LEAST_WHEN_BACK))
        elif move.leaves == "stale":
            rows.append(at_most(f"{where}.share", what, share, "x", MOST_WHEN_STALE))
        else:
            rows.append(Row(f"{where}.share", what, share, "x"))
    return rows
