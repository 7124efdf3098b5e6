"""Tiny random checkpoints in the formats that the launch scripts name, so that every script runs without a GPU.

    python -m tests.support.make_stand_ins llama3.1-8b /tmp/tiny
    MODEL_DIR=/tmp/tiny/target DRAFT_DIR=/tmp/tiny/draft bash scripts/run-eagle3-llama3.1-8B.sh --debug-rollout-only \\
      --rollout-engine embedded --rollout-num-gpus-per-engine 0

Targets have tokens for bytes and the tokenizer files; dtypes, contexts and tensor names are those of the real ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.tiny_drafts import BLOCK, EAGLE3, edit_config, make_tiny_draft, make_tiny_mimo
from tests.support.tiny_models import LLAMA3_ROPE, add_mtp_layer
from tests.support.tiny_policy import make_tiny_policy

VOCAB = 257  # bytes and an end token
NUM_LAYERS = 4  # EAGLE-3 heads read the outputs of the first three; SGLang cannot hand out the last layer's
DRAFT_CONTEXT = 2048
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
MIMO_CONFIGURATION = """\
from transformers import Qwen2Config


class MiMoConfig(Qwen2Config):
    model_type = "mimo"
"""
YARN = {
    **{"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1},
    **{"mscale": 1.0, "mscale_all_dim": 1.0},
}
# Of R1's config.json, what transformers does not write and SGLang reads.
R1_KEYS = {
    **{"rope_theta": 10000, "rope_scaling": YARN, "moe_layer_freq": 1, "topk_method": "noaux_tc"},
    **{"scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "ep_size": 1},
}
LATENT = {
    **{"q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12},
    **{"num_key_value_heads": 6, "head_dim": 8, "first_k_dense_replace": 1, "n_routed_experts": 4},
    **{"n_shared_experts": 1, "n_group": 2, "topk_group": 1},
}


@dataclass(frozen=True)
class StandIn:
    """The folders of a tiny target and, where it has an external one, its draft."""

    target: Path
    draft: Path | None

    @property
    def environ(self) -> dict[str, str]:
        """What a launch script reads."""
        named = {"MODEL_DIR": self.target, "DRAFT_DIR": self.draft}
        return {name: str(path) for name, path in named.items() if path is not None}


def make_llama(folder: Path) -> StandIn:
    """Llama-3.1-8B-Instruct in bfloat16, and an EAGLE-3 head in float16 that knows 2048 positions."""
    target = make_tiny_policy(
        folder / "target",
        num_hidden_layers=NUM_LAYERS,
        max_position_embeddings=131072,
        rope_parameters={**LLAMA3_ROPE, "rope_theta": 500000.0},
    )
    draft = make_eagle3(folder / "draft", target, max_position_embeddings=DRAFT_CONTEXT)
    return StandIn(in_dtype(target, torch.bfloat16), in_dtype(draft, torch.float16))


def make_mimo(folder: Path) -> StandIn:
    """MiMo-7B-RL: a Qwen2 decoder and an MTP layer in one file, and the code of its configuration beside it.

    Heads have hidden_size / num_attention_heads dimensions, as Qwen2's: its config.json names no other size.
    """
    target = make_tiny_policy(folder / "target")  # for its tokenizer
    eos = json.loads((target / "config.json").read_text())["eos_token_id"]
    make_tiny_mimo(target, vocab_size=VOCAB, eos_token_id=eos, max_position_embeddings=32768, head_dim=8)
    edit_config(target, head_dim=None, auto_map={"AutoConfig": "configuration_mimo.MiMoConfig"})
    (target / "configuration_mimo.py").write_text(MIMO_CONFIGURATION)
    return StandIn(in_dtype(target, torch.bfloat16), None)


def make_glm(folder: Path, use_qk_norm: bool = True) -> StandIn:
    """GLM-4.5/4.6: grouped-query attention, experts, and an MTP layer after the last; Air has no norms of queries."""
    target = make_moe(
        folder / "target",
        "glm4_moe",
        **{
            **EXPERTS,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "use_qk_norm": use_qk_norm,
        },
        attention_bias=True,
        max_position_embeddings=131072,
    )
    add_mtp_layer(target)
    return StandIn(in_dtype(target, torch.bfloat16), None)


def make_deepseek(folder: Path) -> StandIn:
    """DeepSeek-R1: latent attention, experts, and an MTP layer after the last."""
    target = make_moe(folder / "target", "deepseek_v3", **EXPERTS, **LATENT, max_position_embeddings=163840)
    add_mtp_layer(target)
    edit_config(target, rope_parameters=None, **R1_KEYS)
    return StandIn(in_dtype(target, torch.bfloat16), None)


def make_qwen3_moe(folder: Path) -> StandIn:
    """Qwen3-235B-A22B, and a dense EAGLE-3 head."""
    target = make_moe(
        folder / "target", "qwen3_moe", **EXPERTS, num_experts=4, num_local_experts=4, max_position_embeddings=40960
    )
    draft = make_eagle3(folder / "draft", stand_for(folder), max_position_embeddings=40960)
    return StandIn(in_dtype(target, torch.bfloat16), in_dtype(draft, torch.bfloat16))


STAND_INS: Mapping[str, Callable[[Path], StandIn]] = {
    "llama3.1-8b": make_llama,
    "mimo-7b-rl": make_mimo,
    "glm4": make_glm,
    "glm4.5-air": partial(make_glm, use_qk_norm=False),
    "deepseek-r1": make_deepseek,
    "qwen3-235b-a22b": make_qwen3_moe,
}
# Launch script -> what stands in for its checkpoints.
SCRIPTS = {
    "run-eagle3-llama3.1-8B.sh": "llama3.1-8b",
    "run-mimo-7B-rl-mtp.sh": "mimo-7b-rl",
    "run-glm4.5-355B-A32B-mtp.sh": "glm4",
    "run-glm4.6-355B-A32B-mtp.sh": "glm4",
    "run-glm4.5-air-mtp.sh": "glm4.5-air",
    "run-deepseek-r1-mtp.sh": "deepseek-r1",
    "run-qwen3-235B-A22B-eagle3.sh": "qwen3-235b-a22b",
    "run-qwen3-30B-A3B-eagle3.sh": "qwen3-235b-a22b",
}


def stand_for(folder: Path) -> Path:
    """A target of the same sizes that ModelSpec can read, which is all that making a draft needs."""
    return make_tiny_policy(folder / "same-sizes", num_hidden_layers=NUM_LAYERS)


def make_eagle3(folder: Path, target: Path, **config: Any) -> Path:
    return make_tiny_draft(folder, target, {**EAGLE3, **BLOCK, "model_type": "llama", "vocab_size": VOCAB, **config})


def make_moe(folder: Path, model_type: str, **settings: Any) -> Path:
    """A random decoder with experts, written by transformers, beside a byte tokenizer."""
    make_tiny_policy(folder)  # for its tokenizer
    eos = json.loads((folder / "config.json").read_text())["eos_token_id"]
    config = AutoConfig.for_model(model_type, **{**SMALL, "eos_token_id": eos, **settings})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def in_dtype(folder: Path, dtype: torch.dtype) -> Path:
    """Store the weights in ``dtype`` and say so in config.json; tables of token ids stay as they are."""
    path = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor] = load_file(path)
    converted = {name: each.to(dtype) if each.is_floating_point() else each for name, each in tensors.items()}
    save_file(converted, path, metadata={"format": "pt"})
    return edit_config(folder, dtype=None, torch_dtype=str(dtype).removeprefix("torch."))


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in STAND_INS:
        sys.stderr.write(f"usage: python -m tests.support.make_stand_ins {{{'|'.join(STAND_INS)}}} FOLDER\n")
        return 2
    made = STAND_INS[arguments[0]](Path(arguments[1]))
    for name, value in made.environ.items():
        sys.stdout.write(f"{name}={value}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
