"""Drafters: what proposes the tokens that the target verifies; one file per algorithm."""

from __future__ import annotations

from slime_spec.config.tree import SpeculativeConfig
from slime_spec.interfaces import Drafter, load_choice

DRAFTERS = {
    "NONE": "rollout.embedded.drafters.none:NoneDrafter",
    "LOOKUP": "rollout.embedded.drafters.lookup:LookupDrafter",
}


def make_drafter(config: SpeculativeConfig) -> Drafter:
    drafter: Drafter = load_choice("speculative.algorithm", DRAFTERS, config.algorithm)(config)
    return drafter
