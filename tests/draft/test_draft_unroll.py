"""The unrolled forward of training: its steps are what an inference round computes, row by row."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from slime_spec.checkpoints.block_parts import Experts, LatentAttention
from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import draft_shapes
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.draft.block import DraftAttention, KeysValues
from slime_spec.draft.build import load_network
from slime_spec.draft.latent import DraftLatentAttention
from slime_spec.draft.unroll import Unroll, make_unroll
from tests.support.reference_drafts import ReferenceDraft
from tests.support.tiny_drafts import BLOCK, random_tensors, some_target_ids

TARGET = ModelSpec.from_dict({**BLOCK, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4})
LLAMA = replace(TARGET, num_layers=1)
EAGLE3 = DraftSpec("eagle3", LLAMA, 48, 61, capture_layers=(0, 1, 2), has_own_head=True)
MTP = DraftSpec("mtp", LLAMA, 48, 131, hidden_first=True, recurrent_norm=True, zero_first_embedding=True)
EAGLE = DraftSpec("eagle", LLAMA, 48, 131, fc_bias=True, logits_norm=False)
EXPERTS = Experts(6, 2, 20, num_shared=1, score="sigmoid", has_correction=True, scaling=2.5)
GLM_BLOCK = replace(LLAMA, architecture="Glm4MoeForCausalLM", rotary_columns=8, qk_norm=True, experts=EXPERTS)
LATENT = LatentAttention(24, 20, 16, 8, 12)
DEEPSEEK_BLOCK = replace(
    replace(LLAMA, architecture="DeepseekV3ForCausalLM", num_kv_heads=6, head_dim=24, rotary_columns=8),
    experts=EXPERTS,
    latent=LATENT,
)
BEHIND_THE_LAST = DraftSpec("mtp", GLM_BLOCK, 48, 131, recurrent_norm=True, num_target_layers=4, in_target=True)
DFLASH = DraftSpec("dflash", replace(LLAMA, num_layers=2, qk_norm=True), 48, 131, (0, 2), block_size=6, mask_token_id=7)
DSPARK = replace(DFLASH, family="dspark", block_size=5, drafts_from_root=True, markov_rank=8)
SPECS = {
    "eagle": EAGLE,
    "eagle with a qwen2 block and no bias": replace(
        EAGLE, fc_bias=False, block=replace(LLAMA, architecture="Qwen2ForCausalLM", qkv_bias=True)
    ),
    "eagle3": EAGLE3,
    "eagle3, normed layers and bias": replace(EAGLE3, fc_norm=True, fc_bias=True),
    "eagle3, one norm before fc": replace(EAGLE3, norm_before_fc=True),
    "eagle3, recurrence after the norm": replace(EAGLE3, recurrent_norm=True),
    "eagle3, logits before the norm": replace(EAGLE3, logits_norm=False),
    "eagle3 of the final state": replace(EAGLE3, capture_layers=()),
    "eagle3 with biases of attention": replace(EAGLE3, block=replace(LLAMA, qkv_bias=True, out_bias=True)),
    "dflash": DFLASH,
    "dflash with biases of attention": replace(DFLASH, block=replace(DFLASH.block, qkv_bias=True, out_bias=True)),
    "dspark": DSPARK,
    "dspark of masks alone": replace(DSPARK, drafts_from_root=False),
    "dspark with a gated head": replace(DSPARK, markov_kind="gated"),
    "dspark with a recurrent head": replace(DSPARK, markov_kind="rnn"),
    "dspark of masks alone with a recurrent head": replace(DSPARK, drafts_from_root=False, markov_kind="rnn"),
    "mtp": MTP,
    "mtp of glm": BEHIND_THE_LAST,
    "mtp of deepseek": replace(BEHIND_THE_LAST, block=DEEPSEEK_BLOCK),
    "mtp with a qwen2 block": replace(MTP, block=replace(LLAMA, architecture="Qwen2ForCausalLM", qkv_bias=True)),
}
NUM_STEPS = 4


def reference_of(spec: DraftSpec, tensors: dict[str, torch.Tensor], embedding: torch.Tensor) -> ReferenceDraft:
    ids = some_target_ids(spec) if spec.has_own_head else torch.arange(spec.block.vocab_size)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    head = doubles.get("lm_head.weight", embedding)
    return ReferenceDraft(spec, doubles, embedding, head, ids)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_every_step_of_every_row_is_what_a_round_computes(spec: DraftSpec) -> None:
    tensors = random_tensors(draft_shapes(spec))
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(131, 48, generator=generator, dtype=torch.float64)
    lengths, starts = (11, 7), (3, 0)
    token_ids = torch.randint(0, 131, (2, max(lengths)), generator=generator)
    features = torch.randn(2, max(lengths), spec.feature_size, generator=generator, dtype=torch.float64)
    reference = reference_of(spec, tensors, embedding)
    network = load_network(spec, tensors).double()
    # In double as well: EAGLE's logits, of no norm, reach a hundred, and float32's angles would move them.
    for module in network.modules():
        if isinstance(module, DraftAttention | DraftLatentAttention):
            width = spec.block.rotary_dim
            module.inv_freq = spec.block.rope_theta ** (-torch.arange(0, width, 2).double() / width)
    num_rows = 6
    unroll = make_unroll(network, partial(F.embedding, weight=embedding), torch.tensor(starts), num_rows)
    compared = 0
    for step in range(NUM_STEPS):
        if step == 0:
            head_input = unroll.first(features, token_ids)
        else:
            columns = torch.tensor(starts)[:, None] + 1 + step + torch.arange(num_rows)
            head_input = unroll.next(token_ids.gather(1, columns.clamp(max=max(lengths) - 1)))
        if spec.markov_rank:
            states, behind = head_input.split([48, spec.markov_rank], dim=-1)
            logits = states @ reference.head.T + behind @ reference.tensors["markov_head.markov_w2.weight"].T
        else:
            logits = head_input @ reference.head.T
        distributions = logits.log_softmax(-1)
        for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            for t in range(start, min(start + num_rows, length - 1 - step)):
                known, path = token_ids[b, : t + 2].tolist(), token_ids[b, t + 2 : t + 2 + step].tolist()
                expected = reference.distribution_after(known, features[b, : t + 1], path)[reference.target_ids]
                torch.testing.assert_close(distributions[b, t - start], expected, rtol=0, atol=1e-5)
                compared += 1
    assert compared == sum(
        min(num_rows, length - 1 - step - start)
        for step in range(NUM_STEPS)
        for start, length in zip(starts, lengths, strict=True)
    )


def attention_row_by_row(
    attention: DraftAttention,
    x: torch.Tensor,
    positions: torch.Tensor,
    context: KeysValues,
    visible: torch.Tensor,
    own: Sequence[KeysValues],
) -> torch.Tensor:
    """One query head of one row at a time: the keys it may see, in order, and an ordinary softmax over them."""
    group = attention.heads // attention.kv_heads
    queries = attention._rotated(attention.q_proj(x).unflatten(-1, (attention.heads, -1)), positions)
    out = torch.zeros_like(queries)
    for b in range(x.shape[0]):
        for row in range(x.shape[1]):
            for head in range(attention.heads):
                kv_head = head // group
                seen = visible[b, row].nonzero().flatten().tolist()
                keys = [context.keys[b, t, kv_head] for t in seen] + [each.keys[b, row, kv_head] for each in own]
                values = [context.values[b, t, kv_head] for t in seen] + [each.values[b, row, kv_head] for each in own]
                scores = [float(queries[b, row, head] @ key) / math.sqrt(attention.head_dim) for key in keys]
                weights = torch.tensor(scores, dtype=x.dtype).softmax(0)
                out[b, row, head] = sum(w * v for w, v in zip(weights, values, strict=True))
    return attention.o_proj(out.flatten(-2))


@torch.no_grad()
def test_attention_sees_the_causal_context_and_of_later_steps_its_own_row_only() -> None:
    torch.manual_seed(0)
    attention = DraftAttention(LLAMA, 96).double()
    rows = torch.tensor([[2, 3, 4], [0, 1, 2]])
    context = attention.keys_values(torch.randn(2, 6, 96).double(), torch.arange(6).expand(2, -1))
    visible = torch.arange(6) <= rows[:, :, None]
    own = [attention.keys_values(torch.randn(2, 3, 96).double(), rows + step) for step in (1, 2)]
    x = torch.randn(2, 3, 96).double()
    fast = attention(x, rows + 2, context, visible, own)
    slow = attention_row_by_row(attention, x, rows + 2, context, visible, own)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    for b, row in ((0, 0), (1, 2)):  # and what another row's step holds changes nothing
        others = [KeysValues(each.keys.clone(), each.values.clone()) for each in own]
        for each in others:
            kept = each.keys[b, row].clone(), each.values[b, row].clone()
            each.keys.normal_()
            each.values.normal_()
            each.keys[b, row], each.values[b, row] = kept
        torch.testing.assert_close(attention(x, rows + 2, context, visible, others)[b, row], fast[b, row])


def test_a_later_step_teaches_the_steps_before_it() -> None:
    tensors = random_tensors(draft_shapes(EAGLE3))
    network = load_network(EAGLE3, tensors)
    embedding = torch.randn(131, 48)
    unroll = Unroll(network, partial(F.embedding, weight=embedding), torch.tensor([0]), 3)
    first = unroll.first(torch.randn(1, 5, EAGLE3.feature_size), torch.randint(0, 131, (1, 5)))
    first.retain_grad()
    second = unroll.next(torch.randint(0, 131, (1, 3)))
    second.sum().backward()
    gradient = network.fc.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
