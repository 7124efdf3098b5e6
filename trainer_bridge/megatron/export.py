"""Write the policy as an ordinary Hugging Face folder: one safetensors file per pipeline stage."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from safetensors.torch import save_file

from slime_spec.checkpoints.families import family_of
from slime_spec.checkpoints.families.experts import served_dtype
from slime_spec.checkpoints.folder import CONFIG, INDEX, SINGLE, CheckpointFolder
from slime_spec.checkpoints.fp8 import Fp8Weight
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.quantization import KEY
from slime_spec.checkpoints.tensors import weights
from slime_spec.errors import ConfigError
from trainer_bridge.checkpoint_folder import publish_folder, tidy, unfinished_folder
from trainer_bridge.megatron.collective_write import WriteFailedError, agree, free_space
from trainer_bridge.megatron.model import PolicyModel, hf_tensors
from trainer_bridge.megatron.process_groups import is_first_of_stage

logger = logging.getLogger(__name__)
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".gguf"}


def export_hf(
    model: PolicyModel, spec: ModelSpec, source: str, folder: str, trained: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write the folder, all ranks together; ``source`` gives config.json and the tokenizer.

    Weights have the model's dtype, which config.json then names, also where those of ``source`` are in fp8.

    ``trained`` has on the last stage's first rank the tensors of the MTP layer inside the checkpoint, where the layer
    was trained; the rest of the layer is the source's, and its copies of the policy's tables are the policy's. Written
    beside, then moved into place, where it replaces an earlier export and nothing else. Raises ConfigError naming the
    folder when that holds something else, or if any rank could not write.
    """
    target = Path(folder)
    _refuse_other_content(target)

    def write() -> None:
        first = dist.get_rank() == 0
        agree(lambda: _begin(Path(source), target, next(model.parameters()).dtype) if first else None)
        unfinished = unfinished_folder(target.parent, target.name)
        weight_map = _write_stage(model, spec, unfinished, StoredLayer.of(Path(source), trained or {}))
        agree(lambda: _publish(target, weight_map) if first else None)

    write_export(folder, write)


def write_export(folder: str, write: Callable[[], None]) -> None:
    """Write an export, all ranks together; raises ConfigError naming the folder where a rank could not."""
    target = Path(folder)
    try:
        write()
    except WriteFailedError as error:
        if dist.get_rank() == 0:
            tidy(target.parent, escape(target.name))
        raise ConfigError(
            f"export folder {folder}",
            f"must take a whole export: {error}",
            free_space(target),
            "Free disk space or choose another --output-dir; an earlier export is intact.",
        ) from None


def _refuse_other_content(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file()):
        raise ConfigError(
            "export folder", "must be new, empty or an earlier export", str(target), "Choose another folder."
        )


def _begin(source: Path, target: Path, dtype: torch.dtype) -> None:
    tidy(target.parent, escape(target.name))
    unfinished = unfinished_folder(target.parent, target.name)
    unfinished.mkdir(parents=True)
    _copy_companions(source, unfinished, dtype)


@dataclass(frozen=True)
class StoredLayer:
    """Names the MTP layers that a checkpoint has beside its policy: ``names`` are none of a family that has none.

    The first is trained, if any is; the others stay as they are stored. ``copies`` are of the policy's tables, by their
    names in the policy.
    """

    source: Path
    trained: Mapping[str, torch.Tensor]
    names: frozenset[str] = frozenset()
    copies: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Path, trained: Mapping[str, torch.Tensor]) -> StoredLayer:
        stored = CheckpointFolder(source)
        layer = family_of(stored.architecture).mtp
        if layer is None:
            return cls(source, trained)
        num_layers = stored.config["num_hidden_layers"]
        names = {name for name in stored.tensors if layer.is_of_any(name, num_layers)}
        pairs = ((name, copy) for name in names for copy in layer.copies if name.endswith(f".{copy}"))
        copies = {name: layer.copies[copy] for name, copy in pairs}
        return cls(source, trained, frozenset(names - copies.keys()), copies)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the layer's own tensors, as they were trained or else stored."""
        yield from self.trained.items()
        wanted = self.names - self.trained.keys()
        for name, each in weights(self.source, wanted.__contains__):
            yield name, each.dequantised() if isinstance(each, Fp8Weight) else each


def _write_stage(model: PolicyModel, spec: ModelSpec, folder: Path, layer: StoredLayer) -> dict[str, str]:
    """Write this stage's file, the MTP layer with the last; returns the file of every tensor of every stage."""
    stage, num_stages = mpu.get_pipeline_model_parallel_rank(), mpu.get_pipeline_model_parallel_world_size()
    file_name = SINGLE if num_stages == 1 else f"model-{stage + 1:05d}-of-{num_stages:05d}.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    # Experts may be spread over all ranks of the stage.
    if mpu.get_data_parallel_rank() == 0 or mpu.get_expert_model_parallel_world_size() > 1:
        for name, tensor in hf_tensors(model, spec):
            if is_first_of_stage():
                tensors[name] = tensor.cpu()
    tensors |= {copy: tensors[name].clone() for copy, name in layer.copies.items() if name in tensors}
    has_draft = bool(tensors) and mpu.is_pipeline_last_stage()

    def write() -> None:
        if has_draft:
            dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
            for name, tensor in layer.tensors():
                tensors[name] = tensor.to("cpu", getattr(torch, served_dtype(name, dtype)))
        if tensors:
            save_file(tensors, folder / file_name, metadata={"format": "pt"})

    agree(write)
    everywhere: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, dict.fromkeys(tensors, file_name))
    return {name: file for part in everywhere for name, file in part.items()}


def _publish(target: Path, weight_map: dict[str, str]) -> None:
    if set(weight_map.values()) != {SINGLE}:
        index = unfinished_folder(target.parent, target.name) / INDEX
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")
    publish_folder(target.parent, target.name)


def _copy_companions(source: Path, target: Path, dtype: torch.dtype) -> None:
    for path in source.iterdir():
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in (INDEX, "config.json"):
            shutil.copyfile(path, target / path.name)
    config = CheckpointFolder(source).json(CONFIG)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    if config.pop(KEY, None) is not None:
        logger.info("exported weights that were loaded in fp8 path=%s dtype=%s left_out=%s", target, config[key], KEY)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
