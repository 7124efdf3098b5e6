"""Weights in fp8 become numbers, and numbers weights in fp8, by blocks (see slime_spec.checkpoints.quantization)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from slime_spec.checkpoints.quantization import BlockScheme

BLOCKS_AT_ONCE = 16  # rows of blocks, so that the copies in fp32 are small
LARGEST = torch.finfo(torch.float8_e4m3fn).max
NAN_CODE = 0x7F  # of e4m3, which has no infinity; the sign apart
FP32_TINY = torch.finfo(torch.float32).tiny


def dequantised(codes: torch.Tensor, scales: torch.Tensor, scheme: BlockScheme) -> torch.Tensor:
    """Return the weight [out, in] in fp32: each code times the scale of its block."""
    outputs, inputs = codes.shape
    by_column = scales.repeat_interleave(scheme.columns, 1)[:, :inputs]
    return codes.float().mul_(by_column.repeat_interleave(scheme.rows, 0)[:outputs])


def largest_fit(largest: torch.Tensor) -> torch.Tensor:
    """Return the scales that bring blocks whose largest numbers are ``largest`` just into e4m3's range, as DeepSeek's.

    A block of zeros, or of numbers so small that their scale would be subnormal, has the least normal number for it.
    """
    return (largest / LARGEST).clamp(min=FP32_TINY)


def quantised(
    weight: torch.Tensor, scheme: BlockScheme, scale_of: Callable[[torch.Tensor], torch.Tensor] = largest_fit
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of ``weight`` [out, in] and the scales that lead back, which ``scale_of`` makes of fp32 maxima.

    With s the scale of its block a number x comes back within max(|x| / 16, s / 1024), as e4m3 has three bits after the
    leading one, down to 1 / 64 (and fp32's own rounding of x / s and of s times a code).
    """
    codes, scales = [], []
    rows, columns = scheme.rows, scheme.columns
    for part in weight.split(BLOCKS_AT_ONCE * rows):
        outputs, inputs = part.shape
        padded = F.pad(part.float(), (0, -inputs % columns, 0, -outputs % rows))
        blocks = padded.view(-1, rows, padded.shape[1] // columns, columns)
        scale = scale_of(blocks.abs().amax(dim=(1, 3)))
        rounded = (blocks / scale[:, None, :, None]).view_as(padded)[:outputs, :inputs]
        codes.append(rounded.to(torch.float8_e4m3fn))
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales)


def has_nan(codes: torch.Tensor) -> torch.Tensor:
    """Return whether any code stands for no number, as a tensor where the codes are: a GPU is not waited for."""
    return ((codes.view(torch.uint8) & NAN_CODE) == NAN_CODE).any()


@dataclass(frozen=True)
class Fp8Weight:
    """Holds a weight as it is stored."""

    codes: torch.Tensor
    scales: torch.Tensor
    scheme: BlockScheme

    def dequantised(self) -> torch.Tensor:
        return dequantised(self.codes, self.scales, self.scheme)


class LoadedTensors(MutableMapping[str, torch.Tensor]):
    """Holds a checkpoint's tensors by name; those in fp8 stay codes, and are dequantised each time one is asked for."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor | Fp8Weight] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        held = self._held[name]
        return held.dequantised() if isinstance(held, Fp8Weight) else held

    def __setitem__(self, name: str, tensor: torch.Tensor | Fp8Weight) -> None:
        self._held[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held  # without dequantising it
