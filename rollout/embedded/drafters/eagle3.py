"""EAGLE-3 (arXiv 2503.01840): one block over three of the target's layers, usually with a reduced vocabulary."""

from __future__ import annotations

from rollout.embedded.drafters.feature_drafter import FeatureDrafter


class Eagle3Drafter(FeatureDrafter):
    """Checkpoints LlamaForCausalLMEagle3, as SpecForge exports and SGLang serves them."""
