"""Verification turns logits into emitted tokens: it computes the sampling distribution and judges drafted tokens."""

from __future__ import annotations

import torch

from rollout.embedded.verification.block import block_verification
from rollout.embedded.verification.device_chains import longest_prefix, token_by_token
from rollout.embedded.verification.device_verifier import DeviceVerifier
from rollout.embedded.verification.rejection import rejection_sampling
from rollout.embedded.verification.threshold import Thresholds, thresholded
from rollout.embedded.verification.verifier import Verifier
from rollout.embedded.verification.verify_pass import RuleVerifier
from rollout.embedded.verification.walk import gumbel_coupling, target_only
from slime_spec.config.tree import SpeculativeConfig

CPU = torch.device("cpu")


def make_verifier(config: SpeculativeConfig, eos_token_ids: frozenset[int], device: torch.device = CPU) -> Verifier:
    """Return the configured rule for logits on ``device``; min_new_tokens keeps ``eos_token_ids`` from being emitted.

    What cannot go together (thresholds without ``lossy``, or with rejection sampling; sampled trees) is refused with
    the configuration, before this.
    """
    if min(config.accept_threshold_single, config.accept_threshold_acc) < 1.0:
        assert config.lossy, "thresholds below 1 need speculative.lossy"
        thresholds = Thresholds(config.accept_threshold_single, config.accept_threshold_acc)
        return RuleVerifier(thresholded(thresholds), eos_token_ids, lossy=True)
    if config.use_gumbel_coupling:
        assert device.type == "cpu", "races are run on the CPU"
        return RuleVerifier(gumbel_coupling, eos_token_ids)
    if device.type != "cpu":
        return make_device_verifier(config, eos_token_ids)
    if config.use_block_verification:
        return RuleVerifier(block_verification, eos_token_ids)
    if config.use_rejection_sampling:
        return RuleVerifier(rejection_sampling, eos_token_ids)
    return RuleVerifier(target_only, eos_token_ids)


def make_device_verifier(config: SpeculativeConfig, eos_token_ids: frozenset[int]) -> DeviceVerifier:
    """Return the rule of an exact configuration in batched operations, which any device runs."""
    if config.use_block_verification:
        return DeviceVerifier(longest_prefix, eos_token_ids)
    return DeviceVerifier(token_by_token if config.use_rejection_sampling else None, eos_token_ids)
