"""DiskTransport writes a checkpoint folder that the server reads; Delivery.check refuses it where it would do harm."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rollout.sglang_engine.client import SglangClient
from slime_spec.checkpoints.folder import SINGLE
from slime_spec.weights.messages import NamedTensors

PATH = "/update_weights_from_disk"


class DiskTransport:
    """Collects a push in a temporary folder beside the target's configuration; the server loads it at the close.

    ``like`` is the target's folder: SGLang reads config.json and the tokenizer from where it reads the weights.
    """

    def __init__(self, like: str, folder: str | None = None) -> None:
        self._like, self._parent = Path(like), folder

    async def open(self, client: SglangClient) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._fields: dict[str, Any] = {}

    async def send(self, client: SglangClient, bucket: NamedTensors, fields: Mapping[str, Any]) -> None:
        self._tensors.update(bucket)
        self._fields |= fields

    async def close(self, client: SglangClient) -> None:
        if not self._tensors:
            return
        folder = Path(tempfile.mkdtemp(prefix="slime_spec-push-", dir=self._parent))
        try:
            for path in self._like.glob("*.json"):
                if "index" not in path.name:
                    shutil.copy(path, folder)
            whole = {name: tensor.contiguous().clone() for name, tensor in self._tensors.items()}
            save_file(whole, folder / SINGLE, metadata={"format": "pt"})
            await client.post(PATH, {"model_path": str(folder), **self._fields})
        finally:
            self._tensors = {}
            shutil.rmtree(folder)
