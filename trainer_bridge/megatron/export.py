"""Write the policy as an ordinary Hugging Face folder: one safetensors file per pipeline stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from safetensors.torch import save_file

from slime_spec.hf.checkpoint import INDEX, SINGLE
from slime_spec.hf.model_spec import ModelSpec
from trainer_bridge.megatron.model import PolicyModel, hf_tensors

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".gguf"}


def export_hf(model: PolicyModel, spec: ModelSpec, source: str, folder: str) -> None:
    """All ranks together; ``source`` gives config.json (its dtype is corrected) and the tokenizer's files."""
    target = Path(folder)
    if dist.get_rank() == 0:
        target.mkdir(parents=True, exist_ok=True)
        _copy_companions(Path(source), target, next(model.parameters()).dtype)
    dist.barrier()
    stage, num_stages = mpu.get_pipeline_model_parallel_rank(), mpu.get_pipeline_model_parallel_world_size()
    file_name = SINGLE if num_stages == 1 else f"model-{stage + 1:05d}-of-{num_stages:05d}.safetensors"
    written: dict[str, str] = {}
    if mpu.get_data_parallel_rank() == 0:
        tensors = {name: tensor.cpu() for name, tensor in hf_tensors(model, spec)}
        if mpu.get_tensor_model_parallel_rank() == 0:
            save_file(tensors, target / file_name, metadata={"format": "pt"})
            written = dict.fromkeys(tensors, file_name)
    everywhere: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, written)
    if dist.get_rank() == 0 and num_stages > 1:
        weight_map = {name: file for part in everywhere for name, file in part.items()}
        (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")


def _copy_companions(source: Path, target: Path, dtype: object) -> None:
    for path in source.iterdir():
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in (INDEX, "config.json"):
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
