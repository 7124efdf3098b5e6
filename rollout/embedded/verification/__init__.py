"""Verification turns logits into emitted tokens: it computes the sampling distribution and judges drafted tokens."""

from __future__ import annotations

from rollout.embedded.verification.block import block_verification
from rollout.embedded.verification.rejection import rejection_sampling
from rollout.embedded.verification.threshold import Thresholds, thresholded
from rollout.embedded.verification.verifier import Verifier
from rollout.embedded.verification.verify_pass import RuleVerifier
from rollout.embedded.verification.walk import target_only
from slime_spec.config.tree import SpeculativeConfig


def make_verifier(config: SpeculativeConfig, eos_token_ids: frozenset[int]) -> Verifier:
    """Return the configured rule; ``eos_token_ids`` are what min_new_tokens keeps from being emitted.

    What cannot go together (thresholds without ``lossy``, or with rejection sampling; sampled trees) is refused with
    the configuration, before this.
    """
    if min(config.accept_threshold_single, config.accept_threshold_acc) < 1.0:
        assert config.lossy, "thresholds below 1 need speculative.lossy"
        thresholds = Thresholds(config.accept_threshold_single, config.accept_threshold_acc)
        return RuleVerifier(thresholded(thresholds), eos_token_ids, lossy=True)
    if config.use_block_verification:
        return RuleVerifier(block_verification, eos_token_ids)
    if config.use_rejection_sampling:
        return RuleVerifier(rejection_sampling, eos_token_ids)
    return RuleVerifier(target_only, eos_token_ids)
