"""Published models with experts, and those that SGLang alone computes: see ``tests.support.published_configs``."""

from __future__ import annotations

from tests.support.published_configs import ANY, BUILT, QWEN3, Published, sizes

_GLM4 = {
    **ANY,
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "topk_group": 1,
    "vocab_size": 151552,
}
_GLM45 = {
    **_GLM4,
    **sizes(5120, 12288, 92, 96, 8, first_k_dense_replace=3, moe_intermediate_size=1536, n_routed_experts=160),
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}
_DEEPSEEK = {
    **ANY,
    **sizes(7168, 18432, 61, 128, 128, first_k_dense_replace=3, moe_intermediate_size=2048, n_routed_experts=256),
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
_QWEN3_MOE = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
# Models with experts that are computed here, too.
MIXED: Published = {
    "deepseek-ai/DeepSeek-V3": _DEEPSEEK,
    "deepseek-ai/DeepSeek-R1": _DEEPSEEK,
    "deepseek-ai/DeepSeek-R1, with weights in bfloat16": {
        name: value for name, value in _DEEPSEEK.items() if name != "quantization_config"
    },
    "zai-org/GLM-4.5": _GLM45,
    "zai-org/GLM-4.6": {**_GLM45, "max_position_embeddings": 202752},
    "zai-org/GLM-4.5-Air": {
        **_GLM4,
        **sizes(4096, 10944, 46, 96, 8, first_k_dense_replace=1, moe_intermediate_size=1408, n_routed_experts=128),
        "routed_scaling_factor": 1.0,
        "use_qk_norm": False,
    },
    "Qwen/Qwen3-235B-A22B": {
        **_QWEN3_MOE,
        **sizes(4096, 12288, 94, 64, 4, max_window_layers=94, moe_intermediate_size=1536),
    },
    "Qwen/Qwen3-30B-A3B": {
        **_QWEN3_MOE,
        **sizes(2048, 6144, 48, 32, 4, max_window_layers=48, moe_intermediate_size=768),
    },
}
# Weights in fp8 with a scale for each block, which are computed here, too.
FP8: Published = {
    "deepseek-ai/DeepSeek-R1": _DEEPSEEK,
    "Qwen/Qwen3-8B-FP8": {
        **BUILT["Qwen/Qwen3-8B"],
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    },
}
# What SGLang alone computes.
SERVED: Published = {
    "neuralmagic/Meta-Llama-3.1-8B-Instruct-FP8": {
        **BUILT["meta-llama/Llama-3.1-8B-Instruct"],
        "quantization_config": {"activation_scheme": "static", "ignored_layers": ["lm_head"], "quant_method": "fp8"},
    },
    "Qwen/Qwen2.5-7B-Instruct, with YaRN as its card says": {
        **BUILT["Qwen/Qwen2.5-7B-Instruct"],
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "mistralai/Mistral-7B-Instruct-v0.3": {
        **ANY,
        **sizes(4096, 14336, 32, 32, 8, max_position_embeddings=32768, vocab_size=32768),
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
}
