"""The real SGLang returns the experts that transformers' routers choose, of speculated samples and siblings too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.sglang_engine.engine import SglangEngine
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import Config, SpeculativeConfig
from slime_spec.errors import ConfigError
from slime_spec.preflight.routing import check_servers_return_experts
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams
from tests.sglang.test_real_families import config_of, make_model
from tests.support.embedded_harness import random_prompt
from tests.support.forced_experts import Routing, same_sets
from tests.support.sglang_real import cpu_environment, started
from tests.support.tiny_models import load_reference

pytestmark = [pytest.mark.long, pytest.mark.sglang_server, pytest.mark.proves("rollout.sglang_engine")]

PROMPTS = (random_prompt(40, seed=1), random_prompt(50, seed=2))


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "Glm4MoeForCausalLM", "DeepseekV3ForCausalLM"])
def test_a_server_returns_the_experts_that_transformers_chooses(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, architecture)
    has_mtp = architecture != "Qwen3MoeForCausalLM"
    config = replaying(config_of(model, tmp_path / "run", has_mtp))
    with cpu_environment(), started(config) as engine:
        samples = generated(engine)
    assert not [index for index, agrees in enumerate(agreement(samples, model)) if not agrees.all()]
    assert not has_mtp or sum(sample.spec.num_proposed for sample in samples) > 0


def test_of_an_n_gram_server_some_are_other_tokens_which_is_why_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once SGLang moves them with the accepted path, this says so, and the refusal of trees and n-grams can go."""
    model = make_model(tmp_path, "Glm4MoeForCausalLM")
    plain = config_of(model, tmp_path / "run", has_mtp=False)
    config = replace(plain, speculative=SpeculativeConfig(algorithm="NGRAM", num_draft_tokens=8))
    with pytest.raises(ConfigError, match="NGRAM worker does not keep the experts"):
        check_servers_return_experts(replaying(config), ModelSpec.from_folder(model))
    monkeypatch.setattr("rollout.sglang_engine.assemble.check_servers_return_experts", lambda config, spec: None)
    with cpu_environment(), started(replaying(config)) as engine:
        samples = [*generated(engine), *generated(engine)]  # the second time it drafts what the first has said
    assert sum(sample.spec.num_correct for sample in samples) > 20
    assert not all(agrees.all() for agrees in agreement(samples, model))


def replaying(config: Config) -> Config:
    return replace(config, rollout=replace(config.rollout, routing_replay=True))


def generated(engine: SglangEngine) -> list[GeneratedSample]:
    params = SamplingParams(max_new_tokens=24, temperature=0.0)
    groups = [GroupRequest(str(index), prompt, (1, 2, 3), params) for index, prompt in enumerate(PROMPTS)]
    return [sample for generation in map(engine.generate, groups) for sample in generation]


def agreement(samples: Sequence[GeneratedSample], model: Path) -> Iterator[Any]:
    """For each sample, by token and layer, whether the experts are those that transformers' router chooses."""
    reference = load_reference(model)
    with Routing(reference, ModelSpec.from_folder(model)).watched() as routing, torch.no_grad():
        for sample in samples:
            text = (*PROMPTS[int(sample.group_id)], *sample.token_ids)
            reference(torch.tensor([text[:-1]]))
            assert sample.routed_experts is not None
            assert len(sample.routed_experts.ids) == len(text) - 1
            yield same_sets(sample.routed_experts.ids, routing.choices)
