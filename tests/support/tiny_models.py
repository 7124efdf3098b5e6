"""Random tiny checkpoints of every supported family, written by transformers itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from slime_spec.checkpoints.families import family_of

MODEL_TYPES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,
}


def make_tiny_checkpoint(folder: Path, architecture: str = "LlamaForCausalLM", **overrides: Any) -> Path:
    """Write a random checkpoint that ``ModelSpec`` and transformers both load; ``overrides`` change its config.json.

    ``initializer_range`` is wide, so that the model has opinions: with the usual 0.02 all tokens are about as likely.
    """
    settings = {**SHAPE, "tie_word_embeddings": False, **MIXED.get(architecture, {}), **overrides}
    config = AutoConfig.for_model(MODEL_TYPES[architecture], **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # transformers starts norms at one, which would hide a norm that is not applied
                parameter.copy_(1.0 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    model.save_pretrained(folder)
    return folder


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same checkpoint in transformers."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    return model.eval()


YARN = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 64},
    **{"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
SIGMOID = {
    **{**ROUTED, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
    **{"norm_topk_prob": True, "routed_scaling_factor": 2.5},
}
# Families whose blocks are not plain: what makes them so, and a choice of experts that needs every part of the router.
MIXED: Mapping[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": {
        **{**ROUTED, "num_experts": 8, "num_local_experts": 8, "norm_topk_prob": True, "mlp_only_layers": [1]},
    },
    "Glm4MoeForCausalLM": {
        **{**SIGMOID, "n_group": 1, "topk_group": 1, "use_qk_norm": True, "attention_bias": True},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    },
    "DeepseekV3ForCausalLM": {
        **{**SIGMOID, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "rope_parameters": YARN},
        **{"q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12},
        **{"num_key_value_heads": 6, "head_dim": 8},
    },
}
MODEL_TYPES |= {name: family_of(name).model_type for name in MIXED}


def add_mtp_layer(folder: Path) -> Path:
    """Give a checkpoint the MTP layer of GLM and DeepSeek, random, behind its last decoder layer."""
    config = json.loads((folder / "config.json").read_text())
    num_layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    drawn = torch.Generator().manual_seed(1)
    tensors = load_file(folder / "model.safetensors")
    last, own = f"model.layers.{num_layers - 1}.", f"model.layers.{num_layers}."
    for name, tensor in list(tensors.items()):
        if name.startswith(last):
            tensors[own + name.removeprefix(last)] = tensor + 0.05 * torch.randn(tensor.shape, generator=drawn)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{own}{name}.weight"] = 1 + 0.2 * torch.randn(hidden, generator=drawn)
    tensors[f"{own}eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=drawn) / hidden**0.5
    tensors[f"{own}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{own}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return folder


def mtp_layer_alone(folder: Path, target: Path) -> Path:
    """The MTP layer of a target in a folder of its own, as layer 0: what lmsys publishes for SGLang."""
    config = json.loads((target / "config.json").read_text())
    own = f"model.layers.{config['num_hidden_layers']}."
    stored = load_file(target / "model.safetensors")
    tensors = {name.replace(own, "model.layers.0."): each for name, each in stored.items() if name.startswith(own)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {"architectures": [config["architectures"][0] + "NextN"], "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
