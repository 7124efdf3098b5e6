"""SegmentAttention computes core attention over packed segments with torch's scaled-dot-product attention.

Megatron's own core attention refuses packed sequences without Transformer Engine, and no kernel there knows responses
that share a prompt; this one does both, on CPU and CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch.nn.attention.bias import causal_lower_right

from trainer_bridge.microbatch import SegmentSpan

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, tuple[SegmentSpan, ...], float | None], torch.Tensor]


@dataclass(frozen=True)
class PackedSegments:
    """Holds the spans and rows that Megatron hands through to the core attention in place of its PackedSeqParams.

    The format name keeps Megatron from applying its own packed ("thd") RoPE and reshaping; ``rows`` are the rows whose
    logits the model computes, ``experts`` the choices that its routers replay (Microbatch.experts).
    """

    spans: tuple[SegmentSpan, ...]
    rows: torch.Tensor
    experts: torch.Tensor | None = None
    qkv_format: str = "segments"


class SegmentAttention(MegatronModule):
    """Lets each response attend causally to its prompt and itself; the constructor has the signature specs expect."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.attend: Attend = attend
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: PackedSegments | None = None,
    ) -> torch.Tensor:
        """Return [T, 1, heads * value dim] from query [T, 1, heads, dim], key and value [T, 1, kv heads, their dim]."""
        assert packed_seq_params is not None, "the policy model only runs on packed segments"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = self.attend(q, k, v, packed_seq_params.spans, self.softmax_scale)
        return out.permute(2, 0, 1, 3).reshape(query.size(0), 1, -1)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return an empty dict: attention has no weights of its own."""
        return {}


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: tuple[SegmentSpan, ...], scale: float | None = None
) -> torch.Tensor:
    """Return ``attend_segments`` of the same tensors, computed in ``attention_dtype`` and rounded to q's dtype."""
    dtype = attention_dtype(q.device, q.dtype)
    return attend_segments(q.to(dtype), k.to(dtype), v.to(dtype), spans, scale).to(q.dtype)


def attention_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a device attends to tensors of ``dtype``: theirs, but float32 for bfloat16 on a CPU.

    There torch's backward pass of attention over 20 to 60 positions takes seven times as long in bfloat16.
    """
    return torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 else dtype


def attend_segments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: tuple[SegmentSpan, ...], scale: float | None = None
) -> torch.Tensor:
    """Return attention [1, heads, T, value dim] of q to k and v [1, kv heads, T, their dim].

    The spans cover T in order. ``scale`` multiplies the scores; None: 1 / sqrt(dim).
    """
    outputs = []
    for span in spans:
        prompt = slice(span.start, span.start + span.prompt_len)
        if len(span.fed_lens) == 1:
            # A single response simply continues its prompt: one causal call for both.
            whole = slice(span.start, prompt.stop + span.fed_lens[0])
            outputs.append(_causal(q[:, :, whole], k[:, :, whole], v[:, :, whole], scale))
            continue
        outputs.append(_causal(q[:, :, prompt], k[:, :, prompt], v[:, :, prompt], scale))
        start = prompt.stop
        for fed_len in span.fed_lens:
            own = slice(start, start + fed_len)
            start += fed_len
            if fed_len:
                seen_k = torch.cat([k[:, :, prompt], k[:, :, own]], dim=2)
                seen_v = torch.cat([v[:, :, prompt], v[:, :, own]], dim=2)
                outputs.append(_causal(q[:, :, own], seen_k, seen_v, scale))
    return torch.cat(outputs, dim=2)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Compute causal attention of the last ``len(q)`` of ``len(k)`` positions."""
    grouped = q.size(1) != k.size(1)
    if q.size(2) == k.size(2):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped, scale=scale)
    bias = causal_lower_right(q.size(2), k.size(2))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped, scale=scale)
