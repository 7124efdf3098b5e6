"""Every draft format with a network of its own, as tiny target and draft: what drafters are tested over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import load_draft
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import load_tensors
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, SpeculativeConfig
from tests.support.reference_drafts import ReferenceDraft
from tests.support.tiny_drafts import (
    DFLASH,
    DSPARK,
    EAGLE,
    EAGLE3,
    GATED,
    NEXTN,
    RECURRENT,
    make_tiny_draft,
    make_tiny_mimo,
)
from tests.support.tiny_models import load_reference, make_tiny_checkpoint

NUM_LAYERS = 4
EVERYTHING = {
    **EAGLE3,
    "num_hidden_layers": 2,
    "bias": True,
    "fc_norm": True,
    "norm_output": True,
    "norm_before_residual": True,
    "rope_theta": 5000.0,
    "draft_vocab_size": None,
    "num_aux_hidden_states": 3,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "norm_before_fc": True},
}
OWN_SIZES = {**EAGLE3, "hidden_size": 32, "num_attention_heads": 4, "target_hidden_size": 48}
# name -> (algorithm, the draft's config.json, or None where the target's own MTP layer drafts)
FORMATS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "eagle3": ("EAGLE3", EAGLE3),
    "eagle3 with every option": ("EAGLE3", EVERYTHING),
    "eagle3 of another width": ("EAGLE3", OWN_SIZES),
    "eagle": ("EAGLE", EAGLE),
    "eagle of two layers without bias": ("EAGLE", {**EAGLE, "num_hidden_layers": 2, "bias": False}),
    "nextn in a folder of its own": ("NEXTN", NEXTN),
    "mimo": ("NEXTN", None),
}
# Drafts of one pass are no trees; they have no step to take beyond their block.
BLOCK_FORMATS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "dflash": ("DFLASH", DFLASH),
    "dspark": ("DSPARK", DSPARK),
    "dspark of masks alone": ("DSPARK", {**DSPARK, "block_size": 4, "sample_from_anchor": False}),
    "dspark with a gated head": ("DSPARK", GATED),
    "dspark of masks alone with a recurrent head": ("DSPARK", {**RECURRENT, "sample_from_anchor": False}),
}


@dataclass(frozen=True)
class TinyDraft:
    """A target and its draft on disk; ``twin`` is the target as transformers knows it."""

    algorithm: str
    target: Path
    twin: Path
    draft: Path

    def config(self, num_steps: int, topk: int = 1, num_draft_tokens: int | None = None, **settings: Any) -> Config:
        """An engine that drafts with it; ``settings`` are those of the speculation, ``engine`` of the engine."""
        engine = settings.pop("engine", {})
        speculative = SpeculativeConfig(
            algorithm=self.algorithm,
            draft_model_path=None if self.draft == self.target else str(self.draft),
            **self._numbers(num_steps, topk, num_draft_tokens),
            **settings,
        )
        model = ModelConfig(hf_checkpoint=str(self.target))
        return Config(model=model, speculative=speculative, engine=EngineConfig(**engine))

    def _numbers(self, num_steps: int, topk: int, num_draft_tokens: int | None) -> dict[str, Any]:
        if self.algorithm in ("DFLASH", "DSPARK"):
            return {"num_draft_tokens": num_steps + 1}
        return {"num_steps": num_steps, "eagle_topk": topk, "num_draft_tokens": num_draft_tokens}

    @property
    def plain(self) -> Config:
        return Config(model=ModelConfig(hf_checkpoint=str(self.target)))


def make_format(folder: Path, name: str) -> TinyDraft:
    algorithm, config = (FORMATS | BLOCK_FORMATS)[name]
    if config is None:
        target = make_tiny_mimo(folder / "target", num_hidden_layers=NUM_LAYERS)
        twin = make_tiny_checkpoint(folder / "twin", "Qwen2ForCausalLM", num_hidden_layers=NUM_LAYERS)
        return TinyDraft(algorithm, target, twin, target)
    target = make_tiny_checkpoint(folder / "target", num_hidden_layers=NUM_LAYERS)
    return TinyDraft(algorithm, target, target, make_tiny_draft(folder / "draft", target, config))


class FreshDraft:
    """The slow draft over the features that transformers computes: no cache, no batch, no history."""

    def __init__(self, tiny: TinyDraft) -> None:
        target = ModelSpec.from_folder(tiny.target)
        spec = DraftSpec.from_folder(tiny.draft, target)
        checkpoint = load_draft(tiny.draft, spec)
        tensors = {name: tensor.double() for name, tensor in checkpoint.tensors.items()}
        shared = {name: tensor.double() for name, tensor in load_tensors(tiny.target, target).items()}
        ids = checkpoint.hot_token_ids
        self._model = load_reference(tiny.twin)
        self._spec = spec
        self.draft = ReferenceDraft(
            spec,
            tensors,
            embedding=tensors.get("embed_tokens.weight", shared["model.embed_tokens.weight"]),
            head=tensors.get("lm_head.weight", shared["lm_head.weight"]),
            target_ids=torch.arange(spec.block.vocab_size) if ids is None else ids,
        )
        self._features = lru_cache(maxsize=4096)(self._computed_features)

    def log_distribution(self, token_ids: Sequence[int], path: Sequence[int] = ()) -> torch.Tensor:
        """fp64 log probabilities [target vocab] of the token after ``token_ids`` (the root last) and ``path``."""
        return self.draft.distribution_after(token_ids, self._features(tuple(token_ids[:-1])), path)

    def _computed_features(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            states = self._model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
        # transformers: states[l + 1] is the output of layer l, but the last one, which is after the final norm.
        parts = [states[layer + 1] for layer in self._spec.capture_layers] or [states[-1]]
        return torch.cat(parts, dim=-1)[0]
