"""What the routes of one server share."""

from __future__ import annotations

from dataclasses import dataclass

from rollout.embedded.engine import EmbeddedEngine
from rollout.embedded.http.generations import Generations
from rollout.embedded.http.one_thread import OneThread
from rollout.embedded.http.totals import Totals
from rollout.embedded.http.versions import VersionNames
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config
from slime_spec.preflight.requests import RequestLimits


@dataclass(frozen=True)
class Serving:
    """One started engine and what is known of it.

    ``control`` is the one thread from which the engine takes all but generate; ``reading`` tokenises large texts.
    """

    config: Config
    spec: ModelSpec
    limits: RequestLimits
    tokenizer: Tokenizer
    engine: EmbeddedEngine
    generations: Generations
    control: OneThread
    reading: OneThread
    names: VersionNames
    totals: Totals
