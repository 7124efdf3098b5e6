"""Models with experts, latent attention and partly rotated heads compute what transformers computes, MTP layers too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from rollout.embedded.assemble import Assembly
from rollout.embedded.core import GenerationCore
from rollout.embedded.drafting import DraftContext
from rollout.embedded.experts import ExpertMlps
from rollout.embedded.kv_cache import KvStore
from rollout.embedded.linear import Packing
from rollout.embedded.mixed_blocks import MixedBlocks, MixedLayer
from rollout.embedded.model import Decoder
from rollout.embedded.plan import RowSpan, make_plan
from rollout.embedded.rope import RopeTable
from rollout.embedded.unread import AnyDraft
from rollout.embedded.weights import DecoderBuilder, named_tensors
from slime_spec.checkpoints.block_parts import Experts
from slime_spec.checkpoints.draft_choice import trainable_draft
from slime_spec.checkpoints.families.experts import CORRECTION
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.routing import route
from slime_spec.checkpoints.tensors import load_tensors
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, SpeculativeConfig
from slime_spec.errors import ConfigError
from slime_spec.types import GroupRequest
from tests.support.embedded_harness import greedy, random_prompt, run
from tests.support.mixed_reference import fused, mtp_logits
from tests.support.tiny_models import MIXED, add_mtp_layer, load_reference, make_tiny_checkpoint, mtp_layer_alone

CPU = torch.device("cpu")
WITH_MTP = ("Glm4MoeForCausalLM", "DeepseekV3ForCausalLM")
PROMPTS = [random_prompt(9, seed=1), random_prompt(14, seed=2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixed")
    made = {name: make_tiny_checkpoint(root / name, name) for name in MIXED}
    for name in WITH_MTP:
        add_mtp_layer(made[name])
    whole = make_tiny_checkpoint(root / "whole-queries", "DeepseekV3ForCausalLM", q_lora_rank=None)
    return {**made, "DeepseekV3ForCausalLM without a latent of queries": whole}


NAMES = [*MIXED, "DeepseekV3ForCausalLM without a latent of queries"]


def decoder_of(folder: Path, dtype: torch.dtype = torch.float32, packing: Packing | None = None) -> Decoder:
    spec = ModelSpec.from_folder(folder)
    builder = DecoderBuilder(spec, RopeTable(spec, 128, dtype, CPU), dtype, CPU, packing)
    for name, tensor in load_tensors(folder, spec).items():
        builder.add(name, tensor)
    return builder.finish()


@torch.inference_mode()
def expected(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([list(token_ids)])).logits[0]
    return logits


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("name", NAMES)
def test_prompts_chunks_steps_and_trees_have_the_logits_of_transformers(
    name: str, packing: Packing, folders: dict[str, Path]
) -> None:
    decoder, model = decoder_of(folders[name], packing=packing), load_reference(folders[name])
    spec = decoder.spec
    assert not spec.has_plain_blocks
    assert isinstance(decoder.blocks, MixedBlocks)
    store = KvStore(spec, torch.float32, CPU)
    store.resize(2, 64)

    def step(token_ids: Sequence[int], *spans: RowSpan) -> torch.Tensor:
        plan = make_plan(store, spans, spec.num_heads // spec.num_kv_heads, torch.float32, CPU)
        hidden, _ = decoder.hidden(torch.tensor(token_ids), plan)
        return decoder.logits(hidden)

    one, other = random_prompt(20, seed=3), random_prompt(9, seed=4)
    wanted = expected(model, one)
    got = step([*one[:7], *other], RowSpan(0, 0, 7), RowSpan(1, 0, 9))
    torch.testing.assert_close(got[:7], wanted[:7], atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(got[7:], expected(model, other), atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(step(one[7:12], RowSpan(0, 7, 5)), wanted[7:12], atol=5e-5, rtol=1e-5)
    for position in range(12, 16):
        got = step([one[position]], RowSpan(0, position, 1))
        torch.testing.assert_close(got, wanted[position : position + 1], atol=5e-5, rtol=1e-5)
    # The continuation, and beside its second token a sibling that has a child.
    tree = step([one[16], one[17], 33, one[18], 44], RowSpan(0, 16, 5, parents=(-1, 0, 0, 1, 2)))
    torch.testing.assert_close(tree[[0, 1, 3]], wanted[16:19], atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(tree[[2, 4]], expected(model, [*one[:17], 33, 44])[-2:], atol=5e-5, rtol=1e-5)


def config_of(folder: Path, algorithm: str = "NONE", **speculative: int) -> Config:
    return Config(
        model=ModelConfig(hf_checkpoint=str(folder)),
        speculative=SpeculativeConfig(algorithm=algorithm, **speculative),
        engine=EngineConfig(dtype="float32"),
    )


def core_of(config: Config) -> GenerationCore:
    return Assembly(config).core(0, perf_counter)


CHAIN = {"num_steps": 3, "eagle_topk": 1, "num_draft_tokens": 4}
TREE = {"num_steps": 3, "eagle_topk": 2, "num_draft_tokens": 6}


@pytest.mark.parametrize(
    ("name", "algorithm", "shape"),
    [
        *((name, algorithm, {}) for name in NAMES for algorithm in ("NONE", "HISTORY")),
        *((name, "NEXTN", shape) for name in WITH_MTP for shape in ({}, CHAIN, TREE)),
    ],
)
def test_an_engine_says_greedily_what_transformers_says(
    name: str, algorithm: str, shape: dict[str, int], folders: dict[str, Path]
) -> None:
    """Two samples a prompt, so that prompts are shared, and replies of different lengths."""
    requests = [
        GroupRequest(str(index), prompt, seeds=(0, 1), params=greedy(10 + 5 * index))
        for index, prompt in enumerate(PROMPTS)
    ]
    samples = run(core_of(config_of(folders[name], algorithm, **shape)), requests)
    model = load_reference(folders[name])
    for index, prompt in enumerate(PROMPTS):
        reply = samples[str(index), 0].token_ids
        assert samples[str(index), 1].token_ids == reply
        wanted = expected(model, [*prompt, *reply])[len(prompt) - 1 : -1]
        assert wanted.argmax(dim=-1).tolist() == list(reply)
        logprobs = wanted.log_softmax(dim=-1).gather(-1, torch.tensor(reply)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(samples[str(index), 0].logprobs), logprobs, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("name", WITH_MTP)
def test_the_mtp_layer_drafts_what_transformers_layer_would(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    core, model = core_of(config_of(folders[name], "NEXTN", **CHAIN)), load_reference(folders[name])
    asked: list[tuple[tuple[int, ...], int]] = []
    propose = core.drafter.propose

    def recorded(contexts: Sequence[DraftContext]) -> Sequence[AnyDraft]:
        drafts = propose(contexts)
        asked.extend(
            (tuple(context.token_ids), draft.read().token_ids[0])
            for context, draft in zip(contexts, drafts, strict=True)
        )
        return drafts

    monkeypatch.setattr(core.drafter, "propose", recorded)
    run(core, [GroupRequest("0", PROMPTS[0], seeds=(0,), params=greedy(12))])
    assert len(asked) > 5
    assert len({draft for _, draft in asked}) > 1
    for token_ids, draft in asked:
        assert int(mtp_logits(folders[name], model, token_ids)[-1].argmax()) == draft


@pytest.mark.parametrize("name", WITH_MTP)
def test_the_layer_in_a_folder_of_its_own_drafts_the_same(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Case draft-varieties: DeepseekV3ForCausalLMNextN and Glm4MoeForCausalLMNextN were refused."""
    inside = config_of(folders[name], "NEXTN", **CHAIN)
    alone = mtp_layer_alone(tmp_path / "alone", folders[name])
    apart = replace(inside, speculative=replace(inside.speculative, draft_model_path=str(alone)))
    requests = [GroupRequest("0", PROMPTS[0], seeds=(0,), params=greedy(24))]
    one, other = (run(core_of(config), requests)["0", 0] for config in (inside, apart))
    assert other.token_ids == one.token_ids
    assert other.spec == one.spec
    assert one.spec.num_proposed > 0


@pytest.mark.parametrize("name", WITH_MTP)
def test_the_layer_in_a_folder_of_its_own_is_trained_where_its_target_is(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(folders[name], "NEXTN", **CHAIN)
    alone = mtp_layer_alone(tmp_path / "alone", folders[name])
    apart = replace(config, speculative=replace(config.speculative, draft_model_path=str(alone)))
    with pytest.raises(ConfigError, match="cannot train this draft"):
        trainable_draft(apart, ModelSpec.from_folder(folders[name]))
    assert trainable_draft(config, ModelSpec.from_folder(folders[name])).folder == folders[name]


def test_a_router_chooses_and_weighs_as_transformers_does() -> None:
    kind = Experts(16, 4, 8, score="sigmoid", has_correction=True, num_groups=4, num_groups_per_token=2, scaling=2.5)
    drawn = torch.Generator().manual_seed(0)
    logits, correction = torch.randn(200, 16, generator=drawn), 0.3 * torch.randn(16, generator=drawn)

    class Settings:
        n_group, topk_group, n_routed_experts, norm_topk_prob = 4, 2, 16, True
        routed_scaling_factor, top_k = 2.5, 4

        class gate:
            e_score_correction_bias = correction

    wanted, weights = DeepseekV3MoE.route_tokens_to_experts(Settings(), logits)  # type: ignore[arg-type]
    assert same_choice(route(logits, kind, correction), (wanted, weights))
    free = replace(kind, num_groups=1, num_groups_per_token=1)
    assert not same_choice(route(logits, free, correction), (wanted, weights))
    assert not same_choice(route(logits, kind, torch.zeros(16)), (wanted, weights))


@pytest.mark.parametrize("renormalises", [True, False])
def test_a_softmax_router_does_too(renormalises: bool) -> None:
    drawn = torch.Generator().manual_seed(1)
    x, router = torch.randn(100, 12, generator=drawn), torch.randn(16, 12, generator=drawn)

    class Settings:
        num_experts_per_tok, num_experts, norm_topk_prob, hidden_size = 4, 16, renormalises, 12

    theirs = Qwen3MoeTopKRouter(Settings())
    theirs.weight.data = router
    logits, weights, wanted = theirs(x)
    assert same_choice(route(logits.detach(), Experts(16, 4, 8, renormalises=renormalises)), (wanted, weights.detach()))


Choice = tuple[torch.Tensor, torch.Tensor]


def same_choice(one: Choice, other: Choice) -> bool:
    """Whether both give every token the same experts the same weights, in any order."""

    def spread(choice: Choice) -> torch.Tensor:
        chosen, weights = choice
        return torch.zeros(len(chosen), 16).scatter(-1, chosen, weights)

    return torch.allclose(spread(one), spread(other), atol=1e-6)


@pytest.mark.parametrize("name", MIXED)
def test_weights_are_read_back_as_they_were_and_corrections_stay_fp32(name: str, folders: dict[str, Path]) -> None:
    tensors = load_tensors(folders[name], ModelSpec.from_folder(folders[name]))
    for dtype in (torch.float32, torch.bfloat16):
        read = named_tensors(decoder_of(folders[name], dtype))
        assert list(read) == list(tensors)
        for key, tensor in tensors.items():
            wide = key.endswith(CORRECTION)
            assert torch.equal(read[key], tensor if wide else tensor.to(dtype)), key
            assert read[key].dtype == (torch.float32 if wide else dtype)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_another_version_are_all_taken_into_use(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Every tensor of the push differs; what kept an old one would say something else."""
    assembly = Assembly(config_of(folders[name]))
    core, builder = assembly.core(0, perf_counter), assembly.builder(CPU)
    model = load_reference(folders[name])
    drawn = torch.Generator().manual_seed(7)
    changed = {
        key: tensor + 0.02 * torch.randn(tensor.shape, generator=drawn)
        for key, tensor in load_tensors(folders[name], assembly.spec).items()
    }
    for key, tensor in changed.items():
        builder.add(key, tensor)
    core.use(builder.finish(), 1)
    state = model.state_dict() | dict(model.named_buffers())
    for layer in range(assembly.spec.num_layers):
        prefix = f"model.layers.{layer}."
        own = {key.removeprefix(prefix): each for key, each in changed.items() if key.startswith(prefix)}
        own = fused(own) if "mlp.experts.0.gate_proj.weight" in own else own
        for key, each in own.items():
            state[prefix + key].copy_(each)
    for key in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        state[key].copy_(changed[key])
    reply = run(core, [GroupRequest("0", PROMPTS[0], seeds=(0,), params=greedy(12))])["0", 0].token_ids
    wanted = expected(model, [*PROMPTS[0], *reply])[len(PROMPTS[0]) - 1 : -1]
    assert wanted.argmax(dim=-1).tolist() == list(reply)


def test_every_weight_of_a_plain_decoder_is_listed_once(folders: dict[str, Path]) -> None:
    for name in MIXED:
        decoder = decoder_of(folders[name], packing=Packing.PLAIN)
        listed = decoder.tensors()
        assert sum(each.numel() for each in listed) == sum(each.numel() for each in named_tensors(decoder).values())
        layer = decoder.layers[-1]
        assert isinstance(layer, MixedLayer)
        assert isinstance(layer.mlp, ExpertMlps)
        layer.move(torch.device("meta"))
        assert {each.device.type for each in decoder.layers[-1].mlp.experts[-1].down.plain_tensors()} == {"meta"}
        assert layer.mlp.router.device.type == "meta"
