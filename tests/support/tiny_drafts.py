"""Tiny random drafts of every format, written the way their tools write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import draft_shapes, save_draft_checkpoint
from slime_spec.checkpoints.model_spec import ModelSpec
from tests.support.tiny_models import make_tiny_checkpoint

DRAFT_VOCAB = 61
BLOCK = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
EAGLE3 = {
    **BLOCK,
    "architectures": ["LlamaForCausalLMEagle3"],
    "draft_vocab_size": DRAFT_VOCAB,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "use_aux_hidden_state": True},
}
EAGLE = {**BLOCK, "architectures": ["LlamaForCausalLMEagle"], "bias": True}
DFLASH: dict[str, Any] = {
    **BLOCK,
    "architectures": ["DFlashDraftModel"],
    "num_hidden_layers": 2,
    "block_size": 6,
    "dflash_config": {"mask_token_id": 130, "target_layer_ids": [0, 2]},
}
DSPARK = {
    **DFLASH,
    "architectures": ["DSparkDraftModel"],
    "block_size": 5,
    "dflash_config": {
        **DFLASH["dflash_config"],
        "projector_type": "dspark",
        "markov_rank": 8,
        "markov_head_type": "vanilla",
    },
}
GATED, RECURRENT = (
    {**DSPARK, "dflash_config": {**DSPARK["dflash_config"], "markov_head_type": kind}} for kind in ("gated", "rnn")
)
NEXTN = {**BLOCK, "architectures": ["LlamaForCausalLMNextN"], "num_nextn_predict_layers": 1}


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Opinionated random weights: norms around one, matrices whose outputs are of the size of their inputs."""
    generator = torch.Generator().manual_seed(seed)

    def one(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            return 1.0 + 0.3 * noise
        return noise * (0.3 if len(shape) == 1 else 1.5 / shape[-1] ** 0.5)

    return {name: one(name, shape) for name, shape in shapes.items()}


def some_target_ids(spec: DraftSpec, seed: int = 0) -> torch.Tensor:
    """An ascending choice of the target's tokens, as many as the draft's head has rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(spec.block.vocab_size, generator=generator)[: spec.draft_vocab_size].sort().values


def make_tiny_draft(folder: Path, target: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Write a random draft for ``target``; its config.json is ``config`` itself, with keys of None left out."""
    config = {key: value for key, value in config.items() if value is not None}
    spec = DraftSpec.from_dict(config, ModelSpec.from_folder(target))
    reduced = spec.draft_vocab_size < spec.block.vocab_size
    tensors = random_tensors(draft_shapes(spec), seed)
    save_draft_checkpoint(folder, spec, tensors, some_target_ids(spec) if reduced else None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_tiny_mimo(folder: Path, **overrides: Any) -> Path:
    """A MiMo target: a Qwen2 decoder whose checkpoint also holds an MTP layer."""
    make_tiny_checkpoint(folder, "Qwen2ForCausalLM", **overrides)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "num_nextn_predict_layers": 1}
    path.write_text(json.dumps(config))
    spec = DraftSpec.from_folder(folder, ModelSpec.from_folder(folder))
    tensors = load_file(folder / "model.safetensors") | random_tensors(draft_shapes(spec))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change keys of a config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Replace or add tensors of a model.safetensors (``__`` in a keyword is a dot); None removes one."""
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
