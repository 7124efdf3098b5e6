"""The config.json of models as their publishers wrote them, by the name on the hub, without code and weights.

Keys that a family's files share are written once; each file has every key of the published one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Published = Mapping[str, dict[str, Any]]

ANY: dict[str, Any] = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_LLAMA = {
    **ANY,
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
    **ANY,
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
QWEN3: dict[str, Any] = {
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


def sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
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
_LLAMA31_8B = {**_LLAMA3, **sizes(4096, 14336, 32, 32, 8), "rope_scaling": _llama3_rope(8.0)}
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
QWEN25_7B = {**_QWEN2, **sizes(3584, 18944, 28, 28, 4, max_window_layers=28, vocab_size=152064)}
_QWEN25_1B = {
    **_QWEN2,
    **sizes(1536, 8960, 28, 12, 2, max_window_layers=28, vocab_size=151936, tie_word_embeddings=True),
}
_QWEN25_05B = {
    **_QWEN2,
    **sizes(896, 4864, 24, 14, 2, max_window_layers=21, vocab_size=151936, tie_word_embeddings=True),
}
_MIMO = {
    **_QWEN2,
    **sizes(4096, 11008, 36, 32, 8, max_window_layers=36, vocab_size=151680),
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
    "meta-llama/Llama-3.2-1B-Instruct": {**_LLAMA32, **sizes(2048, 8192, 16, 32, 8, head_dim=64)},
    "meta-llama/Llama-3.2-3B-Instruct": {**_LLAMA32, **sizes(3072, 8192, 28, 24, 8, head_dim=128)},
    "HuggingFaceTB/SmolLM2-135M-Instruct": {**_SMOLLM2, **sizes(576, 1536, 30, 9, 3)},
    "HuggingFaceTB/SmolLM2-360M-Instruct": {**_SMOLLM2, **sizes(960, 2560, 32, 15, 5)},
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {**_SMOLLM2, **sizes(2048, 8192, 24, 32, 32), "rope_theta": 130000},
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {
        **{key: value for key, value in _LLAMA.items() if key not in ("attention_dropout", "mlp_bias")},
        **sizes(2048, 5632, 22, 32, 4, max_position_embeddings=2048, vocab_size=32000),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_theta": 10000.0,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": {**_LLAMA31_8B, "eos_token_id": 128001},
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": {
        **QWEN25_7B,
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
    "Qwen/Qwen2.5-7B": {**QWEN25_7B, "max_position_embeddings": 131072, "sliding_window": 131072, "use_mrope": False},
    "Qwen/Qwen2.5-7B-Instruct": {**QWEN25_7B, "max_position_embeddings": 32768, "sliding_window": 131072},
    "Qwen/Qwen2.5-7B-Instruct, with its biases named": {
        **QWEN25_7B,
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
        **QWEN25_7B,
        "max_position_embeddings": 4096,
        "rope_theta": 10000,
        "sliding_window": 4096,
        "use_mrope": False,
    },
    "Qwen/Qwen2.5-7B-Instruct-1M": {
        **QWEN25_7B,
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
        **QWEN3,
        **sizes(1024, 3072, 28, 16, 8),
        "max_window_layers": 28,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-1.7B": {
        **QWEN3,
        **sizes(2048, 6144, 28, 16, 8),
        "max_window_layers": 28,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-4B": {**QWEN3, **sizes(2560, 9728, 36, 32, 8), "max_window_layers": 36, "tie_word_embeddings": True},
    "Qwen/Qwen3-8B": {**QWEN3, **sizes(4096, 12288, 36, 32, 8), "max_window_layers": 36},
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
