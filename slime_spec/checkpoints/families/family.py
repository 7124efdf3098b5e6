"""A Family says what differs between model families that this project builds, counts or serves only through SGLang."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slime_spec.algorithms import LOOKUP
from slime_spec.checkpoints.config_keys import Keys
from slime_spec.checkpoints.rope_settings import DEFAULT_KINDS

OTHER_ENGINE = f"draft with it through the SGLang engine, or pass --sglang-speculative-algorithm {LOOKUP.name}"
NOT_EMBEDDED = f"which the embedded engine does not have; {OTHER_ENGINE}"


@dataclass(frozen=True)
class MtpLayer:
    """Describes the MTP layer of one family, whose tensor names begin with ``prefix``.

    ``{layers}`` in the prefix is the target's number of decoder layers.
    ``hidden_first`` says that the projection's columns are [hidden; embedding], else [embedding; hidden]. The order is
    a property of the weights: swapped halves load without complaint and draft nonsense.
    ``block`` precedes the names of the decoder block (a Llama or Qwen2 block where the family is supported).
    ``copies`` are repeated tensors of the target, of its vocabulary's size, by their names in the target; servers drop
    them.
    ``zero_first_embedding``: position 0 reads a zero embedding. ``refused`` says why the embedded engine cannot draft
    with the layer.
    """

    prefix: str
    projection: str
    hidden_first: bool
    embedding_norm: str
    hidden_norm: str
    final_norm: str
    block: str = ""
    copies: Mapping[str, str] = field(default_factory=dict)
    zero_first_embedding: bool = False
    refused: str = ""

    def is_of_any(self, name: str, num_layers: int) -> bool:
        """Return whether a tensor belongs to an MTP layer of a target of ``num_layers`` decoder layers, of any."""
        first = self.prefix_in(num_layers)
        before, _, number = first.removesuffix(".").rpartition(".")
        if not number.isdigit():
            return name.startswith(first)
        found = name.removeprefix(f"{before}.").partition(".")[0]
        return name.startswith(f"{before}.") and found.isdigit() and int(found) >= int(number)

    def prefix_in(self, num_layers: int | None) -> str:
        """Return the prefix in a target of ``num_layers`` decoder layers."""
        return self.prefix.replace("{layers}", str(num_layers))


# The layout that DeepSeek-V3 introduced and GLM-4.5 took over: one more decoder layer, behind the last. Names as in the
# shards of deepseek-ai/DeepSeek-V3 (its README_WEIGHTS.md).
BEHIND_THE_LAST = MtpLayer(
    prefix="model.layers.{layers}.",
    projection="eh_proj.weight",
    hidden_first=False,
    embedding_norm="enorm.weight",
    hidden_norm="hnorm.weight",
    final_norm="shared_head.norm.weight",
    copies={"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"},
)


def _no_fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """Describes the models that config.json calls by one of ``architectures``.

    ``is_built`` says that the embedded engine builds the decoder, ``is_trained`` that the trainer does; SGLang alone
    serves the others. ``qkv_bias`` and ``qk_norm`` are the decoder's; ``fields`` reads, after ``keys`` were checked,
    the fields of a ModelSpec in which the family differs from a dense decoder (from config.json and its path).
    ``rope_kinds`` are the scalings of the rotary embedding that it computes, ``rotary_share`` what it rotates of a
    head. ``keys`` are all keys of config.json
    that transformers' class of the family acts on, ``defaults`` what that class takes for a key that is left out, where
    the decoder would take another value. ``overflows_float16``: activations beyond its 65504 are common.
    ``sglang_finds_mtp``: SGLang takes the target's folder for the draft's without being given a path.
    ``comes_as_code``: transformers does not know ``model_type``; the checkpoint brings the configuration's code.
    """

    architectures: tuple[str, ...]
    model_type: str = ""
    base_model_type: str = (
        ""  # of transformers' own configuration that the family's extends, for a checkpoint without code
    )
    is_built: bool = False
    is_trained: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    keys: Keys = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fields: Callable[[Mapping[str, Any], str], dict[str, Any]] = _no_fields
    rope_kinds: tuple[str, ...] = DEFAULT_KINDS
    rotary_share: float = 1
    mtp: MtpLayer | None = None
    overflows_float16: bool = False
    sglang_finds_mtp: bool = False
    comes_as_code: bool = False

    @property
    def architecture(self) -> str:
        """Return the name that this project writes into a config.json."""
        return self.architectures[0]
