"""Tiny checkpoints, written once per test session, and the device that the engine's tests compute on."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rollout.embedded.assemble import Assembly
from slime_spec.config.tree import Config
from slime_spec.weights.xxh3 import added_up
from tests.support.graphs_on_cpu import graphs_on_cpu
from tests.support.stand_in_device import stand_in_device
from tests.support.tiny_models import make_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def micro_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven tokens and one layer: small enough to count what is sampled."""
    shape = {
        "vocab_size": 7,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.3,
    }
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "micro", **shape)


@pytest.fixture(scope="session", autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give every engine a GPU, or what stands in for it, under ``--device``, whatever its test's configuration says."""
    begin, device = Assembly.__init__, request.config.getoption("--device")

    def on_gpu(self: Assembly, config: Config) -> None:
        begin(self, replace(config, rollout=replace(config.rollout, num_gpus_per_engine=1)))

    stands_in = {"stand-in": stand_in_device, "graphs": graphs_on_cpu}.get(device, nullcontext)
    with pytest.MonkeyPatch.context() as patch, stands_in():
        if device in ("cuda", "stand-in"):
            patch.setattr(Assembly, "__init__", on_gpu)
            patch.setattr("tests.support.toy_rounds.DEVICE", torch.device("cuda"))
        if device == "stand-in":  # which runs torch's operators alone
            patch.setattr("slime_spec.weights.xxh3._quickest", lambda device: added_up)
        yield
