"""Published drafts: see ``tests.support.published_configs``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.published_configs import ANY, QWEN3, QWEN25_7B, sizes

_EAGLE3_LLAMA = {
    **ANY,
    **sizes(4096, 14336, 1, 32, 8, vocab_size=128256, draft_vocab_size=32000),
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
    **QWEN3,
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "draft_vocab_size": 32000,
}
# Drafts that the embedded engine computes -> (their target, their config.json).
DRAFTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "an EAGLE-3 draft with YaRN": (
        "Qwen/Qwen3-8B",
        {
            **_EAGLE3_QWEN3,
            **sizes(4096, 12288, 1, 32, 8),
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 40960, "rope_type": "yarn"},
        },
    ),
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
            **QWEN25_7B,
            "architectures": ["Qwen2ForCausalLMEagle"],
            "max_position_embeddings": 32768,
            "num_hidden_layers": 1,
            "qkv_bias": True,
            "sliding_window": 131072,
        },
    ),
    "AngelSlim/Qwen3-4B_eagle3": (
        "Qwen/Qwen3-4B",
        {**_EAGLE3_QWEN3, **sizes(2560, 9728, 1, 32, 8), "max_window_layers": 36, "modal_type": "LLM"},
    ),
    "AngelSlim/Qwen3-8B_eagle3": (
        "Qwen/Qwen3-8B",
        {**_EAGLE3_QWEN3, **sizes(4096, 12288, 1, 32, 8), "max_window_layers": 36},
    ),
    "SpecForge's qwen3-8b-eagle3, with its layers named": (
        "Qwen/Qwen3-8B",
        {
            **_EAGLE3_QWEN3,
            **sizes(4096, 12288, 1, 32, 8),
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 17, 32], "use_aux_hidden_state": True},
            "mlp_bias": False,
            "pretraining_tp": 1,
        },
    ),
    "SpecForge's qwen2.5-7b-eagle3": (
        "Qwen/Qwen2.5-7B-Instruct",
        {
            **QWEN25_7B,
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
    "SpecForge's qwen3-8b-dflash": (
        "Qwen/Qwen3-8B",
        {
            **QWEN3,
            **sizes(4096, 12288, 5, 32, 8),
            "architectures": ["DFlashDraftModel"],
            "block_size": 16,
            "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
            "layer_types": ["full_attention"] * 5,
            "max_window_layers": 5,
            "num_target_layers": 36,
        },
    ),
    "SpecForge's qwen3-4b-dspark": (
        "Qwen/Qwen3-4B",
        {
            **QWEN3,
            **sizes(2560, 9728, 5, 32, 8),
            "architectures": ["DSparkDraftModel"],
            "block_size": 7,
            "dflash_config": {
                "attention_mode": "gqa",
                "mask_token_id": 151669,
                "target_layer_ids": [1, 9, 17, 25, 33],
                "projector_type": "dspark",
                "markov_rank": 256,
                "markov_head_type": "vanilla",
                "confidence_head_alpha": 1.0,
                "enable_confidence_head": True,
                "confidence_head_with_markov": True,
            },
            "layer_types": ["full_attention"] * 5,
            "max_window_layers": 5,
            "num_target_layers": 36,
        },
    ),
    # As SpecForge's qwq-32B-eagle3 and gemma3-1b-eagle3: a window shorter than the context, and switched off.
    "an EAGLE-3 draft with Qwen2's keys of windows": (
        "Qwen/Qwen2.5-7B",
        {
            **QWEN25_7B,
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": 32000,
            "max_position_embeddings": 40960,
            "num_hidden_layers": 1,
            "sliding_window": 32768,
        },
    ),
}
# As other writers name or nest a draft -> (the draft of DRAFTS that it is, their config.json).
OTHER_WRITERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3": (
        "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
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
        "AngelSlim/Qwen3-8B_eagle3",
        {**_EAGLE3_QWEN3, **sizes(4096, 12288, 1, 32, 8), "architectures": ["Eagle3LlamaForCausalLM"]},
    ),
}
