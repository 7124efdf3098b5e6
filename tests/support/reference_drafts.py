"""Draft networks written down plainly, in fp64 and without any cache: what the engine's are held against.

One function per family, in the order of its paper; a sequence is recomputed from its first token for every question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.model_spec import ModelSpec

Tensors = Mapping[str, torch.Tensor]


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """``x`` [positions, heads, dim], position by position."""
    positions, _, dim = x.shape
    angles = torch.arange(positions).double()[:, None] / theta ** (torch.arange(0, dim, 2).double() / dim)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., : dim // 2], x[..., dim // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(x: torch.Tensor, tensors: Tensors, prefix: str, block: ModelSpec) -> torch.Tensor:
    """Causal grouped-query attention over rows of ``x``."""
    length = x.shape[0]

    def heads(name: str, count: int) -> torch.Tensor:
        y = x @ tensors[f"{prefix}self_attn.{name}_proj.weight"].T + tensors.get(
            f"{prefix}self_attn.{name}_proj.bias", 0
        )
        return y.view(length, count, block.head_dim)

    def turned(name: str, count: int) -> torch.Tensor:
        own = heads(name, count)
        if block.qk_norm:
            own = norm(own, tensors[f"{prefix}self_attn.{name}_norm.weight"], block.rms_norm_eps)
        first, rest = own[..., : block.rotary_dim], own[..., block.rotary_dim :]
        return torch.cat([rotated(first, block.rope_theta), rest], dim=-1)

    query = turned("q", block.num_heads)
    group = block.num_heads // block.num_kv_heads
    keys = turned("k", block.num_kv_heads).repeat_interleave(group, dim=1)
    values = heads("v", block.num_kv_heads).repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) / block.head_dim**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).reshape(length, -1)
    return out @ tensors[f"{prefix}self_attn.o_proj.weight"].T + tensors.get(f"{prefix}self_attn.o_proj.bias", 0)


def gated(x: torch.Tensor, tensors: Tensors, prefix: str) -> torch.Tensor:
    gate, up = (x @ tensors[f"{prefix}{name}_proj.weight"].T for name in ("gate", "up"))
    return (F.silu(gate) * up) @ tensors[prefix + "down_proj.weight"].T


def after_attention(x: torch.Tensor, tensors: Tensors, prefix: str, eps: float) -> torch.Tensor:
    return x + gated(norm(x, tensors[prefix + "post_attention_layernorm.weight"], eps), tensors, prefix + "mlp.")


def eagle3(spec: DraftSpec, tensors: Tensors, e: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the head reads, the next step's hidden state) for rows of embeddings and of states."""
    eps = spec.block.rms_norm_eps
    halves = [
        norm(e, tensors["midlayer.input_layernorm.weight"], eps),
        norm(x, tensors["midlayer.hidden_norm.weight"], eps),
    ]
    start = halves[1] if spec.residual_norm else x
    y = start + attention(torch.cat(halves, dim=-1), tensors, "midlayer.", spec.block)
    y = after_attention(y, tensors, "midlayer.", eps)
    for layer in range(1, spec.block.num_layers):
        prefix = f"layers.{layer}."
        y = y + attention(norm(y, tensors[prefix + "hidden_norm.weight"], eps), tensors, prefix, spec.block)
        y = after_attention(y, tensors, prefix, eps)
    normed = norm(y, tensors["norm.weight"], eps)
    return normed if spec.logits_norm else y, normed if spec.recurrent_norm else y


def eagle(spec: DraftSpec, tensors: Tensors, e: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.cat([e, h], dim=-1) @ tensors["fc.weight"].T + tensors.get("fc.bias", 0)
    for layer in range(spec.block.num_layers):
        prefix = f"layers.{layer}."
        inputs = y if layer == 0 else norm(y, tensors[prefix + "input_layernorm.weight"], spec.block.rms_norm_eps)
        y = y + attention(inputs, tensors, prefix, spec.block)
        y = after_attention(y, tensors, prefix, spec.block.rms_norm_eps)
    return y, y


def mtp(spec: DraftSpec, tensors: Tensors, e: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    prefix, eps = "model.mtp_layers.0.", spec.block.rms_norm_eps
    e = torch.cat([torch.zeros_like(e[:1]), e[1:]])  # MiMo's first position has no token
    halves = [
        norm(h, tensors[prefix + "hidden_layernorm.weight"], eps),
        norm(e, tensors[prefix + "token_layernorm.weight"], eps),
    ]
    x = torch.cat(halves, dim=-1) @ tensors[prefix + "input_proj.weight"].T
    x = x + attention(norm(x, tensors[prefix + "input_layernorm.weight"], eps), tensors, prefix, spec.block)
    y = norm(after_attention(x, tensors, prefix, eps), tensors[prefix + "final_layernorm.weight"], eps)
    return y, y


def behind_the_last(
    spec: DraftSpec, tensors: Tensors, e: torch.Tensor, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The MTP layer of GLM-4.5 and DeepSeek-V3, with experts."""
    prefix, eps = f"model.layers.{spec.num_target_layers}.", spec.block.rms_norm_eps
    halves = [norm(e, tensors[prefix + "enorm.weight"], eps), norm(h, tensors[prefix + "hnorm.weight"], eps)]
    x = torch.cat(halves, dim=-1) @ tensors[prefix + "eh_proj.weight"].T
    attend = attention if spec.block.latent is None else latent_attention
    x = x + attend(norm(x, tensors[prefix + "input_layernorm.weight"], eps), tensors, prefix, spec.block)
    normed = norm(x, tensors[prefix + "post_attention_layernorm.weight"], eps)
    routed = torch.stack([routed_mlp(row, tensors, prefix, spec.block) for row in normed])
    y = norm(x + routed, tensors[prefix + "shared_head.norm.weight"], eps)
    return y, y


def latent_attention(x: torch.Tensor, tensors: Tensors, prefix: str, block: ModelSpec) -> torch.Tensor:
    """Causal latent attention (arXiv 2405.04434, equations 37 to 47), whose rotated columns are neighbours."""
    latent, length, heads = block.latent, x.shape[0], block.num_heads
    assert latent is not None
    own = prefix + "self_attn."

    def turned(y: torch.Tensor) -> torch.Tensor:
        pairs = torch.cat([y[..., 0::2], y[..., 1::2]], dim=-1)
        return rotated(pairs, block.rope_theta)

    low = norm(x @ tensors[own + "q_a_proj.weight"].T, tensors[own + "q_a_layernorm.weight"], 1e-6)
    query = (low @ tensors[own + "q_b_proj.weight"].T).view(length, heads, -1)
    kv = x @ tensors[own + "kv_a_proj_with_mqa.weight"].T
    small = norm(kv[:, : latent.latent_rank], tensors[own + "kv_a_layernorm.weight"], 1e-6)
    raised = (small @ tensors[own + "kv_b_proj.weight"].T).view(length, heads, -1)
    shared = turned(kv[:, None, latent.latent_rank :]).expand(-1, heads, -1)
    keys = torch.cat([raised[..., : latent.nope_dim], shared], dim=-1)
    query = torch.cat([query[..., : latent.nope_dim], turned(query[..., latent.nope_dim :])], dim=-1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) / (latent.nope_dim + latent.rope_dim) ** 0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), raised[..., latent.nope_dim :]).reshape(length, -1)
    return out @ tensors[own + "o_proj.weight"].T


def routed_mlp(x: torch.Tensor, tensors: Tensors, prefix: str, block: ModelSpec) -> torch.Tensor:
    """One token's experts (arXiv 2412.19437, equations 12 to 16), without groups."""
    kind = block.experts
    assert kind is not None
    scores = (x @ tensors[prefix + "mlp.gate.weight"].T).sigmoid()
    preferred = scores + tensors[prefix + "mlp.gate.e_score_correction_bias"]
    chosen = sorted(range(kind.num_experts), key=lambda expert: -float(preferred[expert]))[: kind.num_per_token]
    total = sum(float(scores[expert]) for expert in chosen)
    out = gated(x, tensors, prefix + "mlp.shared_experts.")
    for expert in chosen:
        weight = float(scores[expert]) / total * kind.scaling
        out = out + weight * gated(x, tensors, f"{prefix}mlp.experts.{expert}.")
    return out


def dflash(spec: DraftSpec, tensors: Tensors, block: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """What the head reads of a block's embeddings [block, hidden] behind features [tokens, width] of all tokens."""
    eps, num_context = spec.block.rms_norm_eps, len(features)
    context = norm(features @ tensors["fc.weight"].T, tensors["hidden_norm.weight"], eps)
    y, group = block, spec.block.num_heads // spec.block.num_kv_heads
    for layer in range(spec.block.num_layers):
        prefix = f"layers.{layer}."
        x = norm(y, tensors[prefix + "input_layernorm.weight"], eps)
        read = torch.cat([context, x])  # the context itself, in every layer

        def heads(name: str, prefix: str = prefix, read: torch.Tensor = read) -> torch.Tensor:
            made = read @ tensors[f"{prefix}self_attn.{name}_proj.weight"].T
            made = made + tensors.get(f"{prefix}self_attn.{name}_proj.bias", 0)
            each = made.unflatten(-1, (-1, spec.block.head_dim))
            if name == "v":
                return each
            return rotated(norm(each, tensors[f"{prefix}self_attn.{name}_norm.weight"], eps), spec.block.rope_theta)

        query = heads("q")[num_context:]
        keys, values = (heads(name).repeat_interleave(group, dim=1) for name in "kv")
        scores = torch.einsum("qhd,khd->hqk", query, keys) / spec.block.head_dim**0.5  # no mask: all see all
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).flatten(1)
        out = out @ tensors[f"{prefix}self_attn.o_proj.weight"].T + tensors.get(f"{prefix}self_attn.o_proj.bias", 0)
        y = after_attention(y + out, tensors, prefix, eps)
    return norm(y, tensors["norm.weight"], eps)


def markov_bias(kind: str, tensors: Tensors, before: Sequence[int], states: torch.Tensor) -> torch.Tensor:
    """The bias behind tokens ``before``, the root first, by the block's ``states``: DeepSpec's three heads."""
    w1, w2 = (tensors[f"markov_head.markov_{name}.weight"] for name in ("w1", "w2"))
    rank, memory = w1.shape[1], torch.zeros(w1.shape[1], dtype=torch.float64)
    latent = w1[before[-1]]
    for token_id, state in zip(before, states, strict=False):
        if kind == "gated":  # of the last position alone; those before change nothing
            gate = tensors["markov_head.gate_proj.weight"] @ torch.cat([state, w1[token_id]])
            latent = w1[token_id] / (1 + (-gate - tensors["markov_head.gate_proj.bias"]).exp())
        elif kind == "rnn":
            read = torch.cat([memory, w1[token_id], state])
            mixed = tensors["markov_head.joint_proj.weight"] @ read + tensors["markov_head.joint_proj.bias"]
            kept = 1 / (1 + (-mixed[:rank]).exp())
            memory = kept * memory + (1 - kept) * mixed[rank : 2 * rank].tanh()
            latent = mixed[2 * rank :].tanh()
    return w2 @ latent


FORWARD: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {"eagle3": eagle3, "eagle": eagle, "mtp": mtp}


@dataclass(frozen=True)
class ReferenceDraft:
    """A draft and what it shares with its target; ``head`` [draft vocab, hidden], ``target_ids`` of its rows."""

    spec: DraftSpec
    tensors: Tensors
    embedding: torch.Tensor
    head: torch.Tensor
    target_ids: torch.Tensor

    def projected(self, features: torch.Tensor) -> torch.Tensor:
        spec, eps = self.spec, self.spec.block.rms_norm_eps
        if spec.family != "eagle3" or not spec.capture_layers:
            return features
        if spec.norm_before_fc:
            features = norm(features, self.tensors["input_norm.weight"], eps)
        if spec.fc_norm:
            chunks = features.split(spec.target_hidden_size, dim=-1)
            weights = [self.tensors[f"fc_norm.{index}.weight"] for index in range(len(chunks))]
            features = torch.cat([norm(x, w, eps) for x, w in zip(chunks, weights, strict=True)], dim=-1)
        return features @ self.tensors["fc.weight"].T + self.tensors.get("fc.bias", 0)

    def distribution_after(
        self, token_ids: Sequence[int], features: torch.Tensor, path: Sequence[int] = ()
    ) -> torch.Tensor:
        """Log probabilities [target vocab] of the token after ``token_ids`` (the root last) and a drafted ``path``.

        ``features`` [len(token_ids) - 1, width] are the target's of all tokens but the root. Tokens that the draft has
        no row for have -inf.
        """
        if self.spec.block_size:
            return self._in_block(token_ids[-1], features.double(), path)
        e = self.embedding[torch.tensor(token_ids[1:])]
        x = self.projected(features.double())
        forward = behind_the_last if self.spec.block.experts else FORWARD[self.spec.family]
        read, recurrent = forward(self.spec, self.tensors, e, x)
        for token_id in path:
            e = torch.cat([e, self.embedding[token_id][None]])
            x = torch.cat([x, recurrent[-1:]])
            read, recurrent = forward(self.spec, self.tensors, e, x)
        return self._spread(read[-1])

    def _in_block(self, root: int, features: torch.Tensor, path: Sequence[int]) -> torch.Tensor:
        """A block's tokens do not depend on each other, or (DSpark) on the one before or all before."""
        masks = [self.spec.mask_token_id] * (self.spec.block_size - 1)
        read = dflash(self.spec, self.tensors, self.embedding[torch.tensor([root, *masks])], features)
        row = len(path) + (0 if self.spec.drafts_from_root else 1)
        if not self.spec.markov_rank:
            return self._spread(read[row])
        drafts = read if self.spec.drafts_from_root else read[1:]
        return self._spread(read[row], markov_bias(self.spec.markov_kind, self.tensors, [root, *path], drafts))

    def _spread(self, read: torch.Tensor, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
        distribution = torch.full((self.embedding.shape[0],), float("-inf"), dtype=torch.float64)
        distribution[self.target_ids] = (read @ self.head.T + bias).log_softmax(-1)
        return distribution
