"""Checkpoints in fp8, as DeepSeek-V3's are, made and read by plain loops over their blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LARGEST = 448.0  # of e4m3
PUBLISHED: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def in_blocks(shape: tuple[int, int], block: tuple[int, int]) -> list[tuple[int, int, slice, slice]]:
    """Every block of a matrix: its place among the scales, and its rows and columns."""
    return [
        (top // block[0], left // block[1], slice(top, top + block[0]), slice(left, left + block[1]))
        for top in range(0, shape[0], block[0])
        for left in range(0, shape[1], block[1])
    ]


def quantised_by_loop(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, each scale the largest number of its block over the largest code."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    for row, column, top, left in in_blocks((rows, columns), block):
        scale = float(weight[top, left].float().abs().max()) / LARGEST or 1.0
        scales[row, column] = scale
        codes[top, left] = (weight[top, left].float() / scales[row, column]).to(torch.float8_e4m3fn)
    return codes, scales


def dequantised_by_loop(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    rows, columns = codes.shape
    weight = torch.full((rows, columns), torch.nan)
    for row, column, top, left in in_blocks((rows, columns), block):
        weight[top, left] = codes[top, left].float() * scales[row, column]
    return weight


def is_linear(name: str) -> bool:
    """Whether DeepSeek stores the tensor in fp8: every projection but the MTP layer's own, no router, no head."""
    return (name.endswith("_proj.weight") and "eh_proj" not in name) or name.endswith("kv_a_proj_with_mqa.weight")


def store_in_fp8(folder: Path, block: tuple[int, int] = (16, 16)) -> Path:
    """Store the projections of a checkpoint in fp8, and say so in its config.json."""
    path = folder / "model.safetensors"
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path).items():
        stored[name] = tensor
        if is_linear(name):
            stored[name], stored[name + "_scale_inv"] = quantised_by_loop(tensor, block)
    save_file(stored, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**PUBLISHED, "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def numbers_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint in fp8 as the numbers that it stands for."""
    block = json.loads((folder / "config.json").read_text())["quantization_config"]["weight_block_size"]
    stored = load_file(folder / "model.safetensors")
    return {
        name: dequantised_by_loop(tensor, stored[name + "_scale_inv"], tuple(block))
        if name + "_scale_inv" in stored
        else tensor
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }


def store_numbers(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint in fp8 whose weights are numbers in fp32, for transformers."""
    folder.mkdir()
    save_file(
        {name: each.float() for name, each in numbers_of(source).items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    for path in source.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder
