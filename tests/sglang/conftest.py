"""Engines on fake servers, with the checkpoints that they believe in; one real server of each algorithm; a draft."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.fake import FakeServer, serving
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
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams
from slime_spec.weights.messages import PushMessage
from slime_spec.weights.run import PushReport, run_push
from tests.support.pushes import DirectTransport, other_weights
from tests.support.served_draft import EMBEDDING, DraftModel, Updater
from tests.support.sglang_checkpoints import make_draft, make_target
from tests.support.sglang_real import TABLES, Models, Real, cpu_environment, started
from tests.support.slime_way import installed_plugin

WITH_PLUGIN = "EAGLE"


@dataclass(frozen=True)
class Checkpoints:
    target: Path
    eagle3: Path

    def target_weights(self) -> dict[str, torch.Tensor]:
        """Others than the checkpoint's."""
        return other_weights(self.target, seed=1)

    def draft_weights(self) -> dict[str, torch.Tensor]:
        """Others than the checkpoint's, without its tables."""
        stored = load_file(self.eagle3 / "model.safetensors")
        return {name: tensor * 1.1 for name, tensor in stored.items() if name not in TABLES}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("sglang")
    target = make_target(folder / "target")
    return Checkpoints(target, make_draft(folder / "eagle3", target, "EAGLE3"))


@pytest.fixture
def config(checkpoints: Checkpoints, tmp_path: Path) -> Config:
    return eagle3_config(checkpoints, tmp_path)


def eagle3_config(checkpoints: Checkpoints, folder: Path) -> Config:
    """One engine on the CPU that drafts with EAGLE-3."""
    return Config(
        run=RunConfig(mode="rollout_only", output_dir=str(folder)),
        model=ModelConfig(hf_checkpoint=str(checkpoints.target)),
        engine=EngineConfig(max_running_requests=8, max_total_tokens=4096),
        rollout=RolloutConfig(engine="sglang", num_gpus_per_engine=0, num_cpus_per_engine=1),
        speculative=SpeculativeConfig(
            algorithm="EAGLE3",
            draft_model_path=str(checkpoints.eagle3),
            num_steps=3,
            eagle_topk=1,
            num_draft_tokens=4,
        ),
        sglang_server=SglangServerConfig(start_timeout_s=60.0, canary_prompts=0),
        push=PushConfig(bucket_bytes=100_000),
    )


@dataclass(frozen=True)
class OnFake:
    """An engine and the fake that it believes to be SGLang."""

    engine: SglangEngine
    server: FakeServer

    def push(self, messages: list[PushMessage], **options: Any) -> PushReport:
        return run_push(messages, lambda message: [self.engine.update_weights(message)], **options)

    def generate(self, num_tokens: int = 20, num_samples: int = 1, **params: Any) -> list[GeneratedSample]:
        sampling = SamplingParams(max_new_tokens=num_tokens, **params)
        request = GroupRequest("group", (5, 6, 7), tuple(range(num_samples)), sampling)
        return sorted(self.engine.generate(request), key=lambda sample: sample.sample_index)


Connect = Callable[..., OnFake]


def rows_of(folder: Path) -> dict[str, Any]:
    """What a server shows that has the weights of a checkpoint: the first rows of its tensors."""
    return {name: tensor[:2].tolist() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.fixture
def connect(config: Config) -> Iterator[Connect]:
    """``connect(FakeServer(...), transport="disk")`` starts an engine on it; keywords are sglang_server settings."""
    with ExitStack() as stack:

        def start(server: FakeServer | None = None, base: Config = config, **settings: Any) -> OnFake:
            server = server or FakeServer()
            address = stack.enter_context(serving(server))
            settings = {"external_addrs": (address,), **settings}
            chosen = replace(base, sglang_server=replace(base.sglang_server, **settings))
            engine = SglangEngine(chosen, 0, DirectTransport())
            shown, server.rows = server.rows, rows_of(Path(base.model.hf_checkpoint))
            engine.start()
            stack.callback(engine.stop)
            server.rows = shown
            server.calls.clear()
            return OnFake(engine, server)

        yield start


@pytest.fixture
def process_path() -> str:
    """A PYTHONPATH on which ``python -m sglang.launch_server`` is the fake, a process as SGLang is."""
    root = Path(__file__).resolve().parents[2]
    return f"{root / 'tests' / 'support' / 'sglang_fake'}{os.pathsep}{root}"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.make(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def running(request: pytest.FixtureRequest, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    """One real server of each algorithm, one at a time: tests/conftest.py has those of an algorithm run together."""
    # A server with the plug-in treats the engine's pushes as one without it does: one of the servers has it.
    beside = installed_plugin(tmp_path_factory.mktemp("plugin")) if request.param == WITH_PLUGIN else ()
    config = models.config(request.param, tmp_path_factory.mktemp("run"))
    with cpu_environment(*beside), started(config) as engine:
        yield Real(request.param, engine)


@pytest.fixture
def real(running: Real) -> Real:
    """The server with its checkpoints' weights, whatever an earlier test pushed."""
    running.reset()
    return running


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Any]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def own_tensors(checkpoints: Checkpoints, factor: float = 1.0) -> dict[str, torch.Tensor]:
    stored = load_file(checkpoints.eagle3 / "model.safetensors")
    return {name: each * factor for name, each in stored.items() if name not in TABLES and name != EMBEDDING}


@pytest.fixture
def updater(checkpoints: Checkpoints, one_rank: Any) -> Updater:
    target = torch.nn.Embedding(5, 2)
    runner = SimpleNamespace(
        model=DraftModel(target, own_tensors(checkpoints)),
        model_config=SimpleNamespace(model_path=str(checkpoints.eagle3), quantization=None),
    )
    algorithm = SimpleNamespace(is_standalone=lambda: False, is_ngram=lambda: False)
    config = SimpleNamespace(model_path=str(checkpoints.target))
    served = SimpleNamespace(model=target, model_config=config, spec_algorithm=algorithm)
    worker = SimpleNamespace(weight_update_runners=lambda: [("draft", runner)])
    return Updater(SimpleNamespace(model_runner=served), worker, one_rank)
