"""Read a Llama-architecture GGUF file (llama.cpp's format, version 3) as Hugging Face tensors, config and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slime_spec.checkpoints.families.llama import LLAMA
from slime_spec.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BpeTokenizer

TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# What the reader raises for a damaged file.
DAMAGED = (OSError, ValueError, LookupError, TypeError, ArithmeticError, NotImplementedError)
CONTROL_TOKEN = 3  # LLAMA_TOKEN_TYPE_CONTROL
# llama.cpp's "smollm" pre-tokenizer: every digit on its own, then GPT-2's split.
PRE_TOKENIZERS = ("smollm",)


class GgufModel:
    """Reads one GGUF file: ``config()``, ``tensors()`` and ``tokenizer()`` are in Hugging Face's terms.

    Raises CheckpointError for a file that is damaged or of an architecture or tokenizer not read here.
    """

    def __init__(self, path: str | Path) -> None:
        from gguf import GGUFReader

        self.path = Path(path)
        try:
            self._reader = GGUFReader(self.path)
        except DAMAGED as error:
            raise self._unreadable("must be a whole GGUF file", str(error)) from None
        if self._field("general.architecture") != "llama":
            raise self._unreadable("general.architecture must be llama", self._field("general.architecture"))

    def config(self) -> dict[str, Any]:
        """Return the contents of config.json, for weights stored as float32."""
        heads = self._size("llama.attention.head_count")
        only = {
            **{"llama.rope.dimension_count": self._size("llama.embedding_length") // heads, "llama.expert_count": 0},
            **{"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1, "llama.attention.sliding_window": 0},
        }
        for key, value in only.items():
            if key in self._reader.fields and self._field(key) != value:
                raise self._unreadable(f"{key} must be {value}: no other value is computed here", self._field(key))
        return {
            "architectures": [LLAMA.architecture],
            "model_type": LLAMA.model_type,
            "hidden_act": "silu",
            "hidden_size": self._field("llama.embedding_length"),
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self._field("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._field("llama.attention.head_count_kv"),
            "head_dim": self._size("llama.embedding_length") // heads,
            "vocab_size": self._field("llama.vocab_size"),
            "max_position_embeddings": self._field("llama.context_length"),
            "rms_norm_eps": _shortest(self._field("llama.attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest(self._field("llama.rope.freq_base")),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in self._reader.tensors),
            "torch_dtype": "float32",
            **self.special_token_ids(),
        }

    def special_token_ids(self) -> dict[str, int]:
        """Return ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, as generation_config.json also has them."""
        eos = self._field("tokenizer.ggml.eos_token_id")
        pad = self._reader.fields.get("tokenizer.ggml.padding_token_id")
        return {
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": eos,
            "pad_token_id": eos if pad is None else pad.contents(),
        }

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor, dequantised to float32, under its Hugging Face name, one at a time."""
        from gguf import dequantize

        rotated_heads = {
            "attn_q": self._size("llama.attention.head_count"),
            "attn_k": self._size("llama.attention.head_count_kv"),
        }
        for stored in self._reader.tensors:
            name, part = self._name(stored.name), stored.name.split(".")[-2]
            try:
                values = dequantize(stored.data, stored.tensor_type).astype(np.float32)
                if part in rotated_heads:
                    values = halves_from_pairs(values, rotated_heads[part])
            except DAMAGED as error:
                raise self._unreadable(f"must hold a whole {stored.name}", str(error)) from None
            yield name, torch.from_numpy(np.ascontiguousarray(values))

    def tokenizer(self) -> tuple[BpeTokenizer, dict[str, Any]]:
        """Return the byte-level BPE tokenizer and the contents of tokenizer_config.json, chat template included."""
        try:
            return self._tokenizer()
        except CheckpointError:
            raise
        except Exception as error:  # noqa: BLE001 - the Rust library raises bare Exception, and nothing narrower
            raise self._unreadable("must hold a whole tokenizer", str(error)) from None

    def _tokenizer(self) -> tuple[BpeTokenizer, dict[str, Any]]:
        from tokenizers import Tokenizer as BpeTokenizer
        from tokenizers import decoders, models, pre_tokenizers

        kind = (self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre"))
        if kind[0] != "gpt2" or kind[1] not in PRE_TOKENIZERS:
            raise self._unreadable(f"its tokenizer must be gpt2 BPE of {', '.join(PRE_TOKENIZERS)}", kind)
        tokens: list[str] = self._field("tokenizer.ggml.tokens")
        types: list[int] = self._field("tokenizer.ggml.token_type")
        left_right = [tuple(merge.split(" ", 1)) for merge in self._field("tokenizer.ggml.merges")]
        bpe = BpeTokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=left_right))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        bpe.decoder = decoders.ByteLevel()
        bpe.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN])
        ids = self.special_token_ids()
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[ids["bos_token_id"]],
            "eos_token": tokens[ids["eos_token_id"]],
            "pad_token": tokens[ids["pad_token_id"]],
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self._field("llama.context_length"),
            "chat_template": self._field("tokenizer.chat_template"),
        }
        return bpe, config

    def _field(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        if field is None:
            raise self._unreadable(f"must have the key {key}", "missing")
        try:
            return field.contents()
        except DAMAGED as error:
            raise self._unreadable(f"must have a whole {key}", str(error)) from None

    def _size(self, key: str) -> int:
        value = self._field(key)
        if type(value) is not int or value < 1:
            raise self._unreadable(f"{key} must be a number from 1", value)
        return value

    def _name(self, stored: str) -> str:
        prefix, *rest = stored.removesuffix(".weight").split(".")
        if prefix == "blk" and len(rest) == 2 and rest[1] in LAYER_NAMES:
            return f"model.layers.{rest[0]}.{LAYER_NAMES[rest[1]]}.weight"
        if not rest and prefix in TOP_NAMES:
            return f"{TOP_NAMES[prefix]}.weight"
        raise self._unreadable("must hold only the tensors of a Llama model", stored)

    def _unreadable(self, rule: str, value: object) -> CheckpointError:
        return CheckpointError(str(self.path), rule, value, "Use a GGUF file of a Llama-architecture model.")


def halves_from_pairs(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of q and k: it rotates neighbours (0,1), Hugging Face rotates halves (0, dim/2)."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def generation_config(model: GgufModel) -> Mapping[str, int]:
    """Return the contents of generation_config.json."""
    return model.special_token_ids()


def _shortest(value: float) -> float:
    """Return the decimal that was meant: GGUF stores float32, so 1e-05 reads back as 9.999999747378752e-06."""
    return float(str(np.float32(value)))
