"""Ranks that share experts push each of them once: a cluster of its own, as Ray allows one at a time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import load_tensors
from slime_spec.config.tree import EngineConfig, RunConfig
from slime_spec.launch.cluster import cluster
from tests.trainer.mixed_policies import DP2_EP2, mixed_policy
from tests.trainer.test_group import received
from tests.trainer.trainer_support import tiny_config
from trainer_bridge.megatron.group import MegatronGroup

LATER = [pytest.param(transport, marks=pytest.mark.long) for transport in ("ipc", "collective")]


@pytest.mark.parametrize("transport", ["object_store", *LATER])
def test_a_push_of_experts_that_two_replicas_share_is_the_checkpoint(transport: str, tmp_path: Path) -> None:
    config = tiny_config(mixed_policy(tmp_path, "DeepseekV3ForCausalLM"), dict(DP2_EP2))
    engine, push = EngineConfig(dtype="bfloat16"), replace(config.push, transport=transport)
    config = replace(config, run=RunConfig(mode="train_only"), engine=engine, push=push)
    spec = ModelSpec.from_folder(config.model.hf_checkpoint)
    with cluster(config, spec) as reserved:
        group = MegatronGroup(config, reserved.ranks)
        group.load()
        pushed = received(group, spec, 1)
        group.stop()
    for name, tensor in load_tensors(config.model.hf_checkpoint, spec).items():
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert torch.equal(pushed[name], tensor.to(dtype)), name
