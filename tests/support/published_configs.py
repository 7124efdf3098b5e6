"""The config.json of models as their publishers wrote them, by the name on the hub, without code and weights.

Keys that a family's files share are written once; each file has every key of the published one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Published = Mapping[str, dict[str, Any]]

_ANY: dict[str, Any] = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_LLAMA = {
    **_ANY,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
}
_QWEN2: dict[str, Any] = {
    **_ANY,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "transformers_version": "4.43.1",
    "use_sliding_window": False,
}
_QWEN3: dict[str, Any] = {
    **_QWEN2,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "transformers_version": "4.51.0",
    "vocab_size": 151936,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


_LLAMA3 = {
    **_LLAMA,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
_LLAMA31_8B = {**_LLAMA3, **_sizes(4096, 14336, 32, 32, 8), "rope_scaling": _llama3_rope(8.0)}
_LLAMA32 = {**_LLAMA3, "rope_scaling": _llama3_rope(32.0), "tie_word_embeddings": True}
_SMOLLM2 = {
    **_LLAMA,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "pad_token_id": 2,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "vocab_size": 49152,
}
_QWEN25_7B = {**_QWEN2, **_sizes(3584, 18944, 28, 28, 4, max_window_layers=28, vocab_size=152064)}
_QWEN25_1B = {
    **_QWEN2,
    **_sizes(1536, 8960, 28, 12, 2, max_window_layers=28, vocab_size=151936, tie_word_embeddings=True),
}
_QWEN25_05B = {
    **_QWEN2,
    **_sizes(896, 4864, 24, 14, 2, max_window_layers=21, vocab_size=151936, tie_word_embeddings=True),
}
_MIMO = {
    **_QWEN2,
    **_sizes(4096, 11008, 36, 32, 8, max_window_layers=36, vocab_size=151680),
    "architectures": ["MiMoForCausalLM"],
    "model_type": "mimo",
    "attention_bias": True,
    "auto_map": {
        "AutoConfig": "configuration_mimo.MiMoConfig",
        "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM",
    },
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 640000,
    "sliding_window": 32768,
    "use_mrope": False,
}
# What the embedded engine and the trainer compute.
BUILT: Published = {
    "XiaomiMiMo/MiMo-7B-RL": {**_MIMO},
    "XiaomiMiMo/MiMo-7B-Base": {**_MIMO, "eos_token_id": 151643},
    "meta-llama/Llama-3.1-8B": {**_LLAMA31_8B, "eos_token_id": 128001},
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA31_8B,
    "meta-llama/Llama-3.2-1B-Instruct": {**_LLAMA32, **_sizes(2048, 8192, 16, 32, 8, head_dim=64)},
    "meta-llama/Llama-3.2-3B-Instruct": {**_LLAMA32, **_sizes(3072, 8192, 28, 24, 8, head_dim=128)},
    "HuggingFaceTB/SmolLM2-135M-Instruct": {**_SMOLLM2, **_sizes(576, 1536, 30, 9, 3)},
    "HuggingFaceTB/SmolLM2-360M-Instruct": {**_SMOLLM2, **_sizes(960, 2560, 32, 15, 5)},
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {**_SMOLLM2, **_sizes(2048, 8192, 24, 32, 32), "rope_theta": 130000},
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {
        **{key: value for key, value in _LLAMA.items() if key not in ("attention_dropout", "mlp_bias")},
        **_sizes(2048, 5632, 22, 32, 4, max_position_embeddings=2048, vocab_size=32000),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_theta": 10000.0,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": {**_LLAMA31_8B, "eos_token_id": 128001},
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": {
        **_QWEN25_7B,
        "eos_token_id": 151643,
        "max_position_embeddings": 131072,
        "rope_theta": 10000,
        "sliding_window": 4096,
        "use_mrope": False,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": {
        **_QWEN25_1B,
        "eos_token_id": 151643,
        "max_position_embeddings": 131072,
        "max_window_layers": 21,
        "rope_theta": 10000,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "use_mrope": False,
    },
    "Qwen/Qwen2.5-0.5B": {
        **_QWEN25_05B,
        "eos_token_id": 151643,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "sliding_window": 32768,
        "use_mrope": False,
    },
    "Qwen/Qwen2.5-0.5B-Instruct": {**_QWEN25_05B, "max_position_embeddings": 32768, "sliding_window": 32768},
    "Qwen/Qwen2.5-1.5B": {
        **_QWEN25_1B,
        "max_position_embeddings": 131072,
        "sliding_window": 131072,
        "use_mrope": False,
    },
    "Qwen/Qwen2.5-1.5B-Instruct": {
        **_QWEN25_1B,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "sliding_window": 32768,
    },
    "Qwen/Qwen2.5-7B": {**_QWEN25_7B, "max_position_embeddings": 131072, "sliding_window": 131072, "use_mrope": False},
    "Qwen/Qwen2.5-7B-Instruct": {**_QWEN25_7B, "max_position_embeddings": 32768, "sliding_window": 131072},
    "Qwen/Qwen2.5-7B-Instruct, with its biases named": {
        **_QWEN25_7B,
        "attention_bias": True,
        "max_position_embeddings": 32768,
    },
    "Qwen/Qwen2.5-Math-1.5B": {
        **_QWEN25_1B,
        "max_position_embeddings": 4096,
        "max_window_layers": 21,
        "rope_theta": 10000,
        "sliding_window": 4096,
        "use_mrope": False,
    },
    "Qwen/Qwen2.5-Math-7B": {
        **_QWEN25_7B,
        "max_position_embeddings": 4096,
        "rope_theta": 10000,
        "sliding_window": 4096,
        "use_mrope": False,
    },
    "Qwen/Qwen2.5-7B-Instruct-1M": {
        **_QWEN25_7B,
        "dual_chunk_attention_config": {
            "chunk_size": 262144,
            "local_size": 8192,
            "original_max_position_embeddings": 262144,
        },
        "max_position_embeddings": 1010000,
        "rope_theta": 10000000.0,
        "sliding_window": 32768,
    },
    "Qwen/Qwen3-0.6B": {
        **_QWEN3,
        **_sizes(1024, 3072, 28, 16, 8),
        "max_window_layers": 28,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-1.7B": {
        **_QWEN3,
        **_sizes(2048, 6144, 28, 16, 8),
        "max_window_layers": 28,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-4B": {**_QWEN3, **_sizes(2560, 9728, 36, 32, 8), "max_window_layers": 36, "tie_word_embeddings": True},
    "Qwen/Qwen3-8B": {**_QWEN3, **_sizes(4096, 12288, 36, 32, 8), "max_window_layers": 36},
}
# Parameters of the decoder, as the hub or the publisher counts them: tied tables once, MTP layers left out.
PARAMETERS = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-Math-7B": 7_615_616_512,
    "Qwen/Qwen2.5-7B-Instruct-1M": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
}
_GLM4 = {
    **_ANY,
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
    **_sizes(5120, 12288, 92, 96, 8, first_k_dense_replace=3, moe_intermediate_size=1536, n_routed_experts=160),
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}
_DEEPSEEK = {
    **_ANY,
    **_sizes(7168, 18432, 61, 128, 128, first_k_dense_replace=3, moe_intermediate_size=2048, n_routed_experts=256),
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
    **_QWEN3,
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
# What SGLang alone computes.
SERVED: Published = {
    "deepseek-ai/DeepSeek-V3": _DEEPSEEK,
    "deepseek-ai/DeepSeek-R1": _DEEPSEEK,
    "zai-org/GLM-4.5": _GLM45,
    "zai-org/GLM-4.6": {**_GLM45, "max_position_embeddings": 202752},
    "zai-org/GLM-4.5-Air": {
        **_GLM4,
        **_sizes(4096, 10944, 46, 96, 8, first_k_dense_replace=1, moe_intermediate_size=1408, n_routed_experts=128),
        "routed_scaling_factor": 1.0,
        "use_qk_norm": False,
    },
    "Qwen/Qwen3-235B-A22B": {
        **_QWEN3_MOE,
        **_sizes(4096, 12288, 94, 64, 4, max_window_layers=94, moe_intermediate_size=1536),
    },
    "Qwen/Qwen3-30B-A3B": {
        **_QWEN3_MOE,
        **_sizes(2048, 6144, 48, 32, 4, max_window_layers=48, moe_intermediate_size=768),
    },
    "Qwen/Qwen3-8B-FP8": {
        **BUILT["Qwen/Qwen3-8B"],
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    },
    "Qwen/Qwen2.5-7B-Instruct, with YaRN as its card says": {
        **BUILT["Qwen/Qwen2.5-7B-Instruct"],
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "mistralai/Mistral-7B-Instruct-v0.3": {
        **_ANY,
        **_sizes(4096, 14336, 32, 32, 8, max_position_embeddings=32768, vocab_size=32768),
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
_EAGLE3_LLAMA = {
    **_ANY,
    **_sizes(4096, 14336, 1, 32, 8, vocab_size=128256, draft_vocab_size=32000),
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
}
_EAGLE3_QWEN3 = {
    **_QWEN3,
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "draft_vocab_size": 32000,
}
# Drafts that the embedded engine computes -> (their target, their config.json).
DRAFTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B": ("meta-llama/Llama-3.1-8B-Instruct", _EAGLE3_LLAMA),
    "jamesliu1/sglang-EAGLE3-Llama-3.1-Instruct-8B": ("meta-llama/Llama-3.1-8B-Instruct", _EAGLE3_LLAMA),
    "yuhuili/EAGLE3-DeepSeek-R1-Distill-LLaMA-8B": ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", _EAGLE3_LLAMA),
    "lmsys/sglang-EAGLE-LLaMA3-Instruct-8B": (
        "meta-llama/Llama-3.1-8B-Instruct",
        {
            **{key: value for key, value in _EAGLE3_LLAMA.items() if key != "draft_vocab_size"},
            "architectures": ["LlamaForCausalLMEagle"],
            "rope_theta": 500000.0,
        },
    ),
    "lmsys/sglang-EAGLE-Qwen2-7B-Instruct": (
        "Qwen/Qwen2.5-7B-Instruct",
        {
            **_QWEN25_7B,
            "architectures": ["Qwen2ForCausalLMEagle"],
            "max_position_embeddings": 32768,
            "num_hidden_layers": 1,
            "qkv_bias": True,
            "sliding_window": 131072,
        },
    ),
    "AngelSlim/Qwen3-4B_eagle3": (
        "Qwen/Qwen3-4B",
        {**_EAGLE3_QWEN3, **_sizes(2560, 9728, 1, 32, 8), "max_window_layers": 36, "modal_type": "LLM"},
    ),
    "AngelSlim/Qwen3-8B_eagle3": (
        "Qwen/Qwen3-8B",
        {**_EAGLE3_QWEN3, **_sizes(4096, 12288, 1, 32, 8), "max_window_layers": 36},
    ),
    "SpecForge's qwen3-8b-eagle3, with its layers named": (
        "Qwen/Qwen3-8B",
        {
            **_EAGLE3_QWEN3,
            **_sizes(4096, 12288, 1, 32, 8),
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 17, 32], "use_aux_hidden_state": True},
            "mlp_bias": False,
            "pretraining_tp": 1,
        },
    ),
    "SpecForge's qwen2.5-7b-eagle3": (
        "Qwen/Qwen2.5-7B-Instruct",
        {
            **_QWEN25_7B,
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "attention_bias": False,
            "draft_vocab_size": 16000,
            "max_position_embeddings": 32768,
            "num_hidden_layers": 1,
            "rope_scaling": None,
            "sliding_window": 131072,
        },
    ),
    # As SpecForge's qwq-32B-eagle3 and gemma3-1b-eagle3: a window shorter than the context, and switched off.
    "an EAGLE-3 draft with Qwen2's keys of windows": (
        "Qwen/Qwen2.5-7B",
        {
            **_QWEN25_7B,
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": 32000,
            "max_position_embeddings": 40960,
            "num_hidden_layers": 1,
            "sliding_window": 32768,
        },
    ),
}
# Drafts that the embedded engine refuses -> (their target, the key, words of the error, their config.json).
REFUSED_DRAFTS: Mapping[str, tuple[str, str, str, dict[str, Any]]] = {
    "RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3": (
        "meta-llama/Llama-3.1-8B-Instruct",
        "architectures",
        "must name a draft: LlamaForCausalLMEagle3, ",
        {
            "architectures": ["Eagle3DraftModel"],
            "auto_map": {"": "eagle3.Eagle3SpeculatorConfig"},
            "draft_vocab_size": 32000,
            "norm_before_residual": False,
            "speculators_model_type": "eagle3",
            "target_hidden_size": None,
            "torch_dtype": "bfloat16",
            "transformer_layer_config": {
                key: value
                for key, value in _EAGLE3_LLAMA.items()
                if key not in ("architectures", "draft_vocab_size", "torch_dtype")
            },
        },
    ),
    "AngelSlim's older name of the architecture": (
        "Qwen/Qwen3-8B",
        "architectures",
        "must name a draft: LlamaForCausalLMEagle3, ",
        {**_EAGLE3_QWEN3, **_sizes(4096, 12288, 1, 32, 8), "architectures": ["Eagle3LlamaForCausalLM"]},
    ),
    "an EAGLE-3 draft with YaRN": (
        "Qwen/Qwen3-8B",
        "rope_scaling.rope_type",
        "must be default or llama3: .*--rollout-engine sglang",
        {
            **_EAGLE3_QWEN3,
            **_sizes(4096, 12288, 1, 32, 8),
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 40960, "rope_type": "yarn"},
        },
    ),
}
