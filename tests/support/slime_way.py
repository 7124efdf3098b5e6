"""Real SGLang servers started as slime starts them, and a client that updates their weights as slime's engine does.

The client knows no session and no side: it pauses, flushes the cache, sends buckets and continues.
"""

from __future__ import annotations

import asyncio
import configparser
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from safetensors.torch import load_file, save_file

from rollout.sglang_engine.client import SglangClient
from rollout.sglang_engine.server import ServerProcess
from rollout.sglang_engine.transports.distributed import DistributedTransport
from slime_spec.ports import free_port
from slime_spec.transports.torch_handles import handles_of, share_by_file
from tests.support.pushes import disturbed
from tests.support.sglang_real import CPU, PROMPTS, ROOT, START_TIMEOUT_S, Models, sglang_python

LAUNCHER = CPU / "launched_by_slime.py"
GROUP = "sglang.srt.plugins"
TIMEOUT_S = 120.0
NUM_BUCKETS = 3
Weights = Mapping[str, torch.Tensor]


def installed_plugin(folder: Path) -> tuple[Path, Path]:
    """Entries of PYTHONPATH that are to SGLang an installed slime_spec: setup.py's entry point, then the packages.

    The first metadata of a name count, and the checkout may have some that are out of date.
    """
    (declared,) = re.findall(rf'"{re.escape(GROUP)}": \["(.+)"\]', (ROOT / "setup.py").read_text())
    info = folder / "slime_spec-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slime_spec\nVersion: 0\n")
    parser = configparser.ConfigParser()
    parser[GROUP] = dict([re.split(r"\s*=\s*", declared, maxsplit=1)])
    with (info / "entry_points.txt").open("w") as file:
        parser.write(file)
    return folder, ROOT


def plugin_environment(folder: Path, plugin: bool = True) -> dict[str, str]:
    """The variables of an SGLang on this CPU, with slime_spec installed beside it or without."""
    path = (CPU, *(installed_plugin(folder) if plugin else ()))
    fixed = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {"PYTHONPATH": os.pathsep.join(map(str, path)), **fixed}


@dataclass(frozen=True)
class Saved:
    """Weights, and a checkpoint's folder that has them."""

    folder: Path
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Stored:
    """A checkpoint's weights and others of the same names, in which no tensor is the same."""

    first: Saved
    other: Saved

    @classmethod
    def make(cls, checkpoint: Path, folder: Path) -> Stored:
        first = Saved(checkpoint, load_file(checkpoint / "model.safetensors"))
        shutil.copytree(checkpoint, folder)
        other = Saved(folder, disturbed(first.weights, seed=1))
        save_file(other.weights, folder / "model.safetensors", metadata={"format": "pt"})
        return cls(first, other)


@dataclass(frozen=True)
class Drafted:
    """The tokens of answers, and in how many rounds of verification each came."""

    token_ids: tuple[tuple[int, ...], ...]
    num_rounds: tuple[int, ...]

    @property
    def num_accepted(self) -> int:
        """Tokens of the draft: each answer's first token comes from the prompt, and each round has a bonus token."""
        return sum(len(ids) - 1 for ids in self.token_ids) - sum(self.num_rounds)


@dataclass(frozen=True)
class SlimeClient:
    """Requests to a running server, which are slime's unless they say otherwise."""

    url: str

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> requests.Response:
        return requests.post(f"{self.url}/{path}", json=body or {}, timeout=TIMEOUT_S)

    def done(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        response = assert_done(self.post(path, body))
        return response.json() if response.text.startswith("{") else response.text

    def pause_and_flush(self) -> None:
        self.done("pause_generation")
        requests.get(f"{self.url}/flush_cache", timeout=TIMEOUT_S).raise_for_status()

    def send_tensors(self, weights: Weights, version: str | None = None) -> requests.Response:
        fields = {"serialized_named_tensors": [payload(weights)], "load_format": None, "flush_cache": False}
        return self.post("update_weights_from_tensor", {**fields, **versioned(version)})

    def update(self, way: str, weights: Saved, version: str | None = None) -> None:
        """Update the target as slime does, by ``tensors``, a process ``group`` or from ``disk``."""
        self.pause_and_flush()
        if way == "tensors":
            for bucket in buckets(weights.weights):
                assert_done(self.send_tensors(bucket, version))
        elif way == "group":
            asyncio.run(self._broadcast(weights.weights, version))
        else:
            assert_done(self.load_folder(weights.folder, version))
        self.done("continue_generation")

    def load_folder(self, folder: Path, version: str | None = None) -> requests.Response:
        return self.post("update_weights_from_disk", {"model_path": str(folder), **versioned(version)})

    async def _broadcast(self, weights: Weights, version: str | None) -> None:
        transport = DistributedTransport("127.0.0.1", 1, on_gpu=False, name="slime")
        client = SglangClient(self.url)
        await client.open()
        try:
            await transport.open(client)
            try:
                for bucket in buckets(weights):
                    fields = {"flush_cache": False, **versioned(version)}
                    await transport.send(client, list(bucket.items()), fields)
            finally:
                await transport.close(client)
        finally:
            await client.close()

    def checksums(self) -> dict[str, str]:
        """Each tensor's, the draft's with the prefix ``draft.``."""
        (rank,) = self.done("weights_checker", {"action": "checksum"})["ranks"]
        return dict(rank["checksums"])

    def drafted(self, num_tokens: int = 40) -> Drafted:
        """Greedy answers to PROMPTS, one after another."""
        sampling = {"temperature": 0.0, "max_new_tokens": num_tokens, "ignore_eos": True}
        answers = [self.done("generate", {"input_ids": list(ids), "sampling_params": sampling}) for ids in PROMPTS]
        return Drafted(
            tuple(tuple(answer["output_ids"]) for answer in answers),
            tuple(answer["meta_info"]["spec_verify_ct"] for answer in answers),
        )

    def info(self) -> dict[str, Any]:
        return dict(requests.get(f"{self.url}/server_info", timeout=TIMEOUT_S).json())

    def session(self) -> dict[str, Any]:
        """What the plug-in shows of its session."""
        return dict(self.info()["internal_states"][0]["slime_spec_plugin"]["weights"]["session"])


@dataclass(frozen=True)
class SlimeServer(SlimeClient):
    """A server that the test started."""

    process: ServerProcess

    def log(self) -> str:
        return self.process.log.read_text(errors="replace")

    def is_alive(self) -> bool:
        return self.process.is_alive and self._is_healthy()

    def _is_healthy(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=5.0).status_code == 200
        except requests.RequestException:
            return False


@contextmanager
def launched_by_slime(
    arguments: Mapping[str, Any], folder: Path, release: str = "", plugin: bool = True, **environment: str
) -> Iterator[SlimeServer]:
    """A server of a release, with slime_spec installed beside it or without."""
    port = free_port("127.0.0.1")
    settings = plugin_environment(folder / "installed", plugin) | environment
    given = json.dumps({**arguments, "port": port})
    process = ServerProcess([sglang_python(release), str(LAUNCHER), given], settings, folder / "server.log")
    server = SlimeServer(f"http://127.0.0.1:{port}", process)
    process.start()
    try:
        process.wait_until(server._is_healthy, START_TIMEOUT_S)
        yield server
    finally:
        process.stop()


def arguments(models: Models, algorithm: str, folder: Path) -> dict[str, Any]:
    """ServerArgs for a server on this CPU that drafts as an algorithm does."""
    settings = models.config(algorithm, folder)
    speculative = settings.speculative
    drafts = {
        "speculative_algorithm": algorithm,
        # SGLang reads MiMo's MTP layer from the path that it is told.
        "speculative_draft_model_path": speculative.draft_model_path or settings.model.hf_checkpoint,
        "speculative_num_steps": speculative.num_steps,
        "speculative_eagle_topk": speculative.eagle_topk,
        "speculative_num_draft_tokens": speculative.num_draft_tokens,
    }
    return {
        "model_path": settings.model.hf_checkpoint,
        "host": "127.0.0.1",
        "device": "cpu",
        "attention_backend": "intel_amx",
        "dtype": "float32",
        "max_total_tokens": 4096,
        "max_running_requests": 8,
        "mem_fraction_static": 0.3,
        "skip_server_warmup": True,
        "sleep_on_idle": True,
        **(drafts if algorithm != "NONE" else {}),
    }


def versioned(version: str | None) -> dict[str, str]:
    return {} if version is None else {"weight_version": version}


def assert_done(response: requests.Response) -> requests.Response:
    assert response.status_code == 200, f"{response.url}: {response.status_code} {response.text}"
    return response


def payload(weights: Weights) -> str:
    share_by_file()
    return handles_of([(name, tensor.clone().share_memory_()) for name, tensor in weights.items()])


def buckets(weights: Weights) -> list[dict[str, torch.Tensor]]:
    names = list(weights)
    return [{name: weights[name] for name in names[first::NUM_BUCKETS]} for first in range(NUM_BUCKETS)]
