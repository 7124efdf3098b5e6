"""The real SGLang on this machine's CPU: installed once by the script that CI uses, and the settings it needs there."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rollout.embedded.engine import EmbeddedEngine
from rollout.sglang_engine.engine import SglangEngine
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
from slime_spec.interfaces import WeightTransport
from slime_spec.speculation.counters import pooled
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams
from slime_spec.weights.run import PushReport, run_push
from tests.support.pushes import DirectTransport, disturbed, push_of
from tests.support.sglang_checkpoints import make_draft, make_target
from tests.support.tiny_drafts import edit_config, make_tiny_mimo
from tests.support.tiny_models import load_reference, make_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "tests" / "support" / "sglang_cpu"
INSTALL_TIMEOUT_S = 1800.0
START_TIMEOUT_S = 300.0  # ready in 15 to 45 s; the rest is for a busy machine
TABLES = ("d2t", "t2d")
ALGORITHMS = ("NONE", "NGRAM", "STANDALONE", "EAGLE", "EAGLE3", "NEXTN")
PROMPTS = ((10, 20, 30, 40), (72, 101, 108, 108, 111), (50, 43, 50, 61), (1, 2, 3, 4, 5, 6, 7, 8), (200, 100, 50))


def on(*algorithms: str) -> pytest.MarkDecorator:
    """A test on the running servers of these algorithms."""
    return pytest.mark.parametrize("running", algorithms, indirect=True)


@cache
def _installed(release: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts" / "install-sglang-cpu.sh"
    command = ["bash", str(script), *([release] if release else [])]
    return subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)


def sglang_python(release: str = "") -> str:
    """The interpreter of the environment, or of another release's over it, installed where it is not there yet.

    SGLANG_RELEASE in the environment names the release where the caller names none. Where it cannot be installed, tests
    fail.
    """
    done = _installed(release or os.environ.get("SGLANG_RELEASE", ""))
    assert done.returncode == 0, f"SGLang for the CPU cannot be installed:\n{done.stderr}"
    return done.stdout.split()[-1]


@contextmanager
def cpu_environment(*more: Path) -> Iterator[None]:
    """What SGLang needs to run on a CPU, for the servers started within; ``more`` is imported from there, too.

    Without ``more`` the plug-in is off: a server that is started in a checkout finds it there.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (CPU, *more))))
        if not more:
            patch.setenv("SLIME_SPEC_PLUGIN_OFF", "all")
        patch.setenv("SGLANG_USE_CPU_ENGINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@dataclass(frozen=True)
class Models:
    """A target and a draft of each format; ``mimo`` is a target that holds its draft, ``mimo_decoder`` without it."""

    target: Path
    eagle: Path
    eagle3: Path
    mimo: Path
    mimo_decoder: Path

    @classmethod
    def make(cls, folder: Path) -> Models:
        target = make_target(folder / "target")
        # SGLang's Qwen2 takes hidden_size / num_attention_heads for the heads' size, whatever config.json says.
        qwen2: dict[str, Any] = {"vocab_size": 257, "eos_token_id": 256, "head_dim": 8}
        mimo = make_tiny_mimo(folder / "mimo", **qwen2)
        # MiMo's own model_type is known to transformers only through the remote code of its checkpoints.
        edit_config(mimo, model_type="qwen2")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(target / name, mimo)
        # The same weights as a model that transformers knows.
        decoder = make_tiny_checkpoint(folder / "decoder", "Qwen2ForCausalLM", **qwen2)
        drafts = (make_draft(folder / name.lower(), target, name) for name in ("EAGLE", "EAGLE3"))
        return cls(target, *drafts, mimo, decoder)

    def reference(self, algorithm: str) -> Path:
        """The target, as transformers loads it."""
        return self.mimo_decoder if algorithm == "NEXTN" else self.target

    def config(self, algorithm: str, folder: Path, **server: Any) -> Config:
        """The same settings for the SGLang engine and the embedded one."""
        return Config(
            run=RunConfig(mode="rollout_only", output_dir=str(folder)),
            model=ModelConfig(hf_checkpoint=str(self.mimo if algorithm == "NEXTN" else self.target)),
            engine=EngineConfig(max_running_requests=8, max_total_tokens=4096),
            rollout=RolloutConfig(engine="sglang", num_gpus_per_engine=0, num_cpus_per_engine=1),
            speculative=self._speculative(algorithm),
            sglang_server=SglangServerConfig(
                **{"python": sglang_python(), "start_timeout_s": START_TIMEOUT_S, "canary_prompts": 0, **server}
            ),
            push=PushConfig(bucket_bytes=100_000),
            # An idle server would keep a core busy, one of two for as long as its tests run.
            sglang={"attention_backend": "intel_amx", "mem_fraction_static": 0.3, "sleep_on_idle": True},
        )

    def _speculative(self, algorithm: str) -> SpeculativeConfig:
        chain: dict[str, Any] = {"num_steps": 3, "eagle_topk": 1, "num_draft_tokens": 4}
        tree: dict[str, Any] = {"num_steps": 3, "eagle_topk": 4, "num_draft_tokens": 16}
        settings: dict[str, dict[str, Any]] = {
            "NONE": {},
            "NGRAM": {"num_draft_tokens": 4, "history": True, "ngram_external_sam_budget": 3},
            "STANDALONE": {"draft_model_path": str(self.target), **chain},
            "EAGLE": {"draft_model_path": str(self.eagle), **tree},
            "EAGLE3": {"draft_model_path": str(self.eagle3), **tree},
            "NEXTN": chain,
        }
        return SpeculativeConfig(algorithm=algorithm, **settings[algorithm])


@contextmanager
def started(config: Config, transport: WeightTransport | None = None) -> Iterator[SglangEngine]:
    engine = SglangEngine(config, 0, transport or DirectTransport())
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@dataclass(frozen=True)
class Real:
    """An SGLang engine of one algorithm on a running server."""

    algorithm: str
    engine: SglangEngine

    @property
    def config(self) -> Config:
        return self.engine.config

    @contextmanager
    def another(self, mode: str = "train", to_server: WeightTransport | None = None, **server: Any) -> Iterator[Real]:
        """A second engine on the same server, which is somebody else's to it, with settings of its own.

        A run that trains begins by pushing the checkpoints' weights; ``to_server`` brings what is pushed later.
        """
        address = self.engine.client.url.removeprefix("http://")
        settings = replace(self.config.sglang_server, external_addrs=(address,), **server)
        run = replace(self.config.run, mode=mode)
        with started(replace(self.config, run=run, sglang_server=settings), to_server) as engine:
            try:
                yield Real(self.algorithm, engine)
            finally:
                # The draft first: this engine would take a draft that it did not push for a lost one.
                if self.draft_weights:
                    self.push(self.draft_weights, 100, "draft")
                self.push(self.target_weights, 100)

    def reset(self) -> None:
        """The checkpoints' weights, whatever was pushed."""
        assert self.engine.server.loop.call(self.engine.client.is_healthy(30.0)), (
            "an earlier test has broken the server"
        )
        if self.engine.weights.version("target"):
            self.push(self.target_weights, 100)
        if self.engine.weights.version("draft"):
            self.push(self.draft_weights, 100, "draft")

    def generate(self, num_tokens: int = 40, **params: Any) -> list[GeneratedSample]:
        """Greedy responses to PROMPTS, in their order."""
        return generate(self.engine, num_tokens, **params)

    def push(self, weights: dict[str, torch.Tensor], version: int, side: Any = "target", **options: Any) -> PushReport:
        messages = push_of(weights, version, side, bucket_bytes=200_000)
        return run_push(messages, lambda message: [self.engine.update_weights(message)], **options)

    @property
    def target_folder(self) -> Path:
        return Path(self.config.model.hf_checkpoint)

    @property
    def target_weights(self) -> dict[str, torch.Tensor]:
        """The checkpoint's, without an MTP layer."""
        stored = load_file(self.target_folder / "model.safetensors")
        return {name: tensor for name, tensor in stored.items() if "mtp" not in name}

    @property
    def draft_weights(self) -> dict[str, torch.Tensor]:
        """What a push of the draft brings; nothing where the drafter has no weights."""
        if self.algorithm in ("NONE", "NGRAM"):
            return {}
        folder = Path(self.config.speculative.draft_model_path or self.config.model.hf_checkpoint)
        stored = load_file(folder / "model.safetensors")
        wanted = (lambda name: "mtp" in name) if self.algorithm == "NEXTN" else (lambda name: name not in TABLES)
        return {name: tensor for name, tensor in stored.items() if wanted(name)}

    def other_target(self, seed: int = 1) -> dict[str, torch.Tensor]:
        return disturbed(self.target_weights, seed)

    def checksums(self, side: Any) -> dict[str, str]:
        return dict(self.engine.server.loop.call(self.engine.weights.delivery.checksums(side)))

    def accepted_per_round(self, num_tokens: int = 40) -> float:
        spec = pooled(sample.spec for sample in self.generate(num_tokens))
        return spec.num_correct / spec.num_rounds


def generate(engine: SglangEngine | EmbeddedEngine, num_tokens: int, **params: Any) -> list[GeneratedSample]:
    settings: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, **params}
    sampling = SamplingParams(max_new_tokens=num_tokens, **settings)
    groups = [engine.generate(GroupRequest(f"p{i}", prompt, (i,), sampling)) for i, prompt in enumerate(PROMPTS)]
    return [sample for group in groups for sample in group]


def embedded_samples(config: Config, num_tokens: int) -> list[GeneratedSample]:
    """What the embedded engine makes of the same settings."""
    embedded = replace(config, rollout=replace(config.rollout, engine="embedded"), sglang={})
    engine = EmbeddedEngine(embedded, 0, DirectTransport())
    engine.start()
    try:
        # One at a time, as a trie of n-grams learns from what others generate.
        return generate(engine, num_tokens)
    finally:
        engine.stop()


@cache
def greedy(folder: Path, num_tokens: int) -> list[tuple[tuple[int, ...], list[float]]]:
    """Greedy decoding of PROMPTS in transformers: each response's tokens and their logprobs."""
    model = load_reference(folder)
    answers = []
    for prompt in PROMPTS:
        ids, logprobs = list(prompt), []
        with torch.no_grad():
            for _ in range(num_tokens):
                distribution = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                ids.append(int(distribution.argmax()))
                logprobs.append(float(distribution.max()))
        answers.append((tuple(ids[len(prompt) :]), logprobs))
    return answers
