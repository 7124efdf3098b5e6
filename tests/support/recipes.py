"""The configurations that the launch scripts run, with the sizes of the models that they name and of their GPUs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.doctor_facts import EAGLE3_HEAD, TARGET

GLM_355B: dict[str, Any] = {
    **{"architectures": ["Glm4MoeForCausalLM"], "hidden_size": 5120, "num_hidden_layers": 92, "vocab_size": 151552},
    **{"num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288},
    **{"moe_intermediate_size": 1536, "n_routed_experts": 160, "n_shared_experts": 1, "first_k_dense_replace": 3},
    **{"attention_bias": True, "use_qk_norm": True, "num_nextn_predict_layers": 1, "model_type": "glm4_moe"},
}
DEEPSEEK_R1: dict[str, Any] = {
    **{"architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "num_hidden_layers": 61, "vocab_size": 129280},
    **{"num_attention_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256},
    **{"n_shared_experts": 1, "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_nextn_predict_layers": 1},
}
QWEN3_235B: dict[str, Any] = {
    **{"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 94, "vocab_size": 151936},
    **{"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 12288},
    **{"moe_intermediate_size": 1536, "num_experts": 128},
}
LLAMA_DRAFT: dict[str, Any] = {**EAGLE3_HEAD, "torch_dtype": "float16", "max_position_embeddings": 2048}
MIMO_7B: dict[str, Any] = {
    **{"architectures": ["MiMoForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 36, "vocab_size": 151680},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 11008, "num_nextn_predict_layers": 1},
    **{"model_type": "mimo", "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"}},
}
QWEN3_DRAFT: dict[str, Any] = {**EAGLE3_HEAD, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128}


@dataclass(frozen=True)
class Recipe:
    """A named configuration, the config.json of its models, and the size of the GPUs that it is for."""

    experiment: str
    target: dict[str, Any]
    draft: dict[str, Any] | None
    gpu_gb: int
    trains: bool = False

    def arguments(self, folder: Path) -> list[str]:
        """Flags of train, with both checkpoints as config.json alone."""
        argv = ["--config", self.experiment, "--hf-checkpoint", str(write_config(folder / "target", self.target))]
        if self.draft is not None:
            argv += ["--speculative-draft-model-path", str(write_config(folder / "draft", self.draft))]
        return argv


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 131072, **config}))
    return folder


FP8 = {"quantization_config": {"quant_method": "fp8"}}
RECIPES = {
    each.experiment: each
    for each in (
        Recipe("eagle3-llama3.1-8b", TARGET, LLAMA_DRAFT, 80, trains=True),
        Recipe("mimo-7b-rl-mtp", MIMO_7B, None, 80, trains=True),
        Recipe("glm4.5-355b-a32b-mtp", GLM_355B, None, 141),
        Recipe("glm4.6-355b-a32b-mtp", GLM_355B, None, 141),
        Recipe("deepseek-r1-mtp", {**DEEPSEEK_R1, **FP8}, None, 141),
        Recipe("qwen3-235b-a22b-eagle3", QWEN3_235B, QWEN3_DRAFT, 141),
    )
}
