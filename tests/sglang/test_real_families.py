"""The real SGLang serves models with experts and latent attention, and takes pushes: transformers says the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import draft_shapes
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.config.tree import (
    Config,
    EngineConfig,
    ModelConfig,
    PushConfig,
    RolloutConfig,
    RunConfig,
    SglangServerConfig,
    SpeculativeConfig,
)
from slime_spec.weights.run import run_push
from tests.support.pushes import disturbed, push_of
from tests.support.sglang_real import START_TIMEOUT_S, cpu_environment, generate, greedy, sglang_python, started
from tests.support.tiny_drafts import edit_config
from tests.support.tiny_models import YARN, add_mtp_layer, make_tiny_checkpoint
from tests.support.tiny_policy import make_tiny_policy

pytestmark = [pytest.mark.long, pytest.mark.sglang_server, pytest.mark.proves("rollout.sglang_engine")]

NUM_TOKENS = 24
FEW_BYTES = 20_000  # of a bucket: most of a layer's tensors travel apart
# What SGLang reads of DeepSeek's config.json, and transformers does not write.
OF_SERVERS: dict[str, dict[str, Any]] = {
    "DeepseekV3ForCausalLM": {
        **{"rope_parameters": None, "rope_theta": YARN["rope_theta"], "moe_layer_freq": 1, "topk_method": "noaux_tc"},
        **{"scoring_func": "sigmoid", "ep_size": 1},
        "rope_scaling": {
            "type": "yarn",
            **{name: value for name, value in YARN.items() if name not in ("rope_type", "rope_theta")},
        },
    }
}


def make_model(folder: Path, architecture: str, **sizes: Any) -> Path:
    tokens = make_tiny_policy(folder / "tokens")
    sizes = {"vocab_size": 257, "eos_token_id": 256, "num_hidden_layers": 4, **sizes}
    if architecture == "Qwen3MoeForCausalLM":
        sizes["mlp_only_layers"] = []  # SGLang gives every layer of this family experts
    model = make_tiny_checkpoint(folder / "model", architecture, **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokens / name, model)
    if architecture != "Qwen3MoeForCausalLM":
        add_mtp_layer(model)
    return edit_config(model, **OF_SERVERS.get(architecture, {}))


def config_of(model: Path, output: Path, has_mtp: bool) -> Config:
    chain: dict[str, Any] = {"num_steps": 3, "eagle_topk": 1, "num_draft_tokens": 4}
    return Config(
        run=RunConfig(output_dir=str(output)),
        model=ModelConfig(hf_checkpoint=str(model)),
        engine=EngineConfig(max_running_requests=8, max_total_tokens=4096),
        rollout=RolloutConfig(engine="sglang", num_gpus_per_engine=0, num_cpus_per_engine=1),
        speculative=SpeculativeConfig(algorithm="NEXTN", **chain) if has_mtp else SpeculativeConfig(algorithm="NONE"),
        sglang_server=SglangServerConfig(
            python=sglang_python(), start_timeout_s=START_TIMEOUT_S, canary_prompts=0, transport="tensor"
        ),
        push=PushConfig(bucket_bytes=FEW_BYTES),
        sglang={"attention_backend": "intel_amx", "mem_fraction_static": 0.3, "sleep_on_idle": True},
    )


def saved_as(model: Path, tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    """The checkpoint with other weights, as transformers loads it."""
    shutil.copytree(model, folder)
    stored = load_file(model / "model.safetensors")
    save_file({**stored, **tensors}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "Glm4MoeForCausalLM", "DeepseekV3ForCausalLM"])
def test_a_server_says_what_transformers_says_before_a_push_and_after_it(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, architecture)
    spec, stored = ModelSpec.from_folder(model), load_file(model / "model.safetensors")
    has_mtp = architecture != "Qwen3MoeForCausalLM"
    target = disturbed({name: stored[name] for name in expected_shapes(spec)}, 1)
    changed = saved_as(model, target, tmp_path / "changed")
    with cpu_environment(), started(config_of(model, tmp_path / "run", has_mtp)) as engine:

        def said() -> list[tuple[tuple[int, ...], list[float]]]:
            return [(each.token_ids, list(each.logprobs)) for each in generate(engine, NUM_TOKENS)]

        def push(tensors: dict[str, torch.Tensor], version: int, side: Any) -> None:
            messages = push_of(tensors, version, side, bucket_bytes=FEW_BYTES)
            run_push(messages, lambda message: [engine.update_weights(message)], verify=True)

        assert_same(said(), greedy(model, NUM_TOKENS))
        push(target, 1, "target")
        assert_same(said(), greedy(changed, NUM_TOKENS))
        # The server shows no weights of these families: from the second push on its checksums are compared.
        for version in (2, 3):
            messages = push_of(disturbed(target, version), version, "target", bucket_bytes=FEW_BYTES)
            assert run_push(messages, lambda message: [engine.update_weights(message)], verify=True).verified
        push(target, 4, "target")
        if has_mtp:
            own = draft_shapes(DraftSpec.from_folder(model, spec))
            before = sums(engine, "draft")
            push(disturbed({name: stored[name] for name in own}, 2), 5, "draft")
            after = sums(engine, "draft")
            shared = ("embed_tokens", "shared_head.head", "lm_head", "rotary", "cos_sin")
            kept = {name for name in before if before[name] == after[name]}
            assert {name for name in kept if not any(part in name for part in shared)} == set()
            assert_same(said(), greedy(changed, NUM_TOKENS))


def sums(engine: Any, side: str) -> dict[str, str]:
    return dict(engine.server.loop.call(engine.weights.delivery.checksums(side)))


def assert_same(
    got: list[tuple[tuple[int, ...], list[float]]], wanted: list[tuple[tuple[int, ...], list[float]]]
) -> None:
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in wanted]
    for (_, ours), (_, theirs) in zip(got, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)
