"""These layers of drafts are quantised (``--speculative-draft-model-quantization``): int8, or fp8 on a GPU that has it.

Rounding a draft moves how many of its tokens are accepted, never the output's distribution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rollout.embedded.kernels.library import Kernels, LinearStruct, kernels
from rollout.embedded.linear import PackedLinear, Packing
from slime_spec.errors import ConfigError

FP8_CAPABILITY = (8, 9)
FP8_TILE = 16  # the kernel's: a matrix of other sizes stays as it is


class Int8Linear(PackedLinear):
    """Stores int8 weights, symmetric, with one fp32 scale per output row: W = scale · round(W / scale), |round| ≤ 127.

    Products are computed in the engine's dtype, the weights' bytes becoming numbers of it in registers; where there are
    no kernels (CUDA among them), from an unpacked copy made for each call, which is slower than no quantisation.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, library: Kernels | None = None) -> None:
        library = library or (kernels() if weight.device.type == "cpu" else None)
        self.packing = Packing.PLAIN if library is None else Packing.NATIVE
        self.bias, self.dtype = bias, weight.dtype
        self.num_outputs, self.num_inputs = weight.shape
        wide = weight.float()
        self._scales = wide.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127.0
        self._weight = (wide / self._scales.unsqueeze(1)).round().to(torch.int8)
        if library is not None:
            self.library = library
            self._weight = _panels(self._weight, library.panel_rows, 2 if self.dtype == torch.bfloat16 else 1)
            pointers = (None if tensor is None else tensor.data_ptr() for tensor in (self._weight, bias, self._scales))
            self.struct = LinearStruct(*pointers, *weight.shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packing is Packing.NATIVE:
            return self._native(x, wide=False)
        return F.linear(x, self.unpacked(), self.bias)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self.unpacked()[indices]

    def unpacked(self) -> torch.Tensor:
        rounded = self._weight
        if self.packing is Packing.NATIVE:
            rounded = rounded.transpose(1, 2).flatten(2).flatten(0, 1)[: self.num_outputs, : self.num_inputs]
        return (rounded.float() * self._scales.unsqueeze(1)).to(self.dtype)

    def move(self, device: torch.device) -> None:
        super().move(device)
        self._scales = self._scales.to(device)


def _panels(rounded: torch.Tensor, panel: int, inputs_per_step: int) -> torch.Tensor:
    """Return int8 [out, in] as [panels, steps, rows of a panel, inputs of a step], see linear.h."""
    outputs, inputs = rounded.shape
    padded = F.pad(rounded, (0, -inputs % inputs_per_step, 0, -outputs % panel))
    return padded.view(-1, panel, padded.shape[1] // inputs_per_step, inputs_per_step).transpose(1, 2).contiguous()


class Fp8Linear(PackedLinear):
    """Stores float8_e4m3fn weights, one scale per output row; activations are rounded row by row for each call.

    For GPUs whose tensor cores multiply fp8 (compute capability 8.9 and later); both sizes are multiples of 16.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.packing = Packing.PLAIN
        self.bias, self.dtype = bias, weight.dtype
        self.num_outputs, self.num_inputs = weight.shape
        self._weight, self._scales = _rounded_to_fp8(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rounded, scales = _rounded_to_fp8(x.reshape(-1, self.num_inputs))
        # The row-wise kernel exists for bf16 results only.
        y = torch._scaled_mm(rounded, self._weight.t(), scales, self._scales.t(), out_dtype=torch.bfloat16)
        y = y.to(self.dtype).view(*x.shape[:-1], self.num_outputs)
        return y if self.bias is None else y + self.bias

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self.unpacked()[indices]

    def unpacked(self) -> torch.Tensor:
        return (self._weight.float() * self._scales).to(self.dtype)

    def move(self, device: torch.device) -> None:
        super().move(device)
        self._scales = self._scales.to(device)


def check_fp8(device: torch.device) -> None:
    """Raise ConfigError for a GPU whose tensor cores do not multiply fp8."""
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise ConfigError(
            "speculative.draft_model_quantization",
            "fp8 needs a GPU of compute capability 8.9 or later",
            ".".join(map(str, capability)),
            "Leave out --sglang-speculative-draft-model-quantization.",
        )


def _rounded_to_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``rows`` [rows, width] in e4m3, and the scales [rows, 1] that lead back."""
    largest = rows.float().abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scales = largest / torch.finfo(torch.float8_e4m3fn).max
    return (rows.float() / scales).to(torch.float8_e4m3fn), scales


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None, quantization: str | None) -> PackedLinear:
    """Return a linear layer over ``weight`` [out, in], in the engine's best form or rounded."""
    if quantization == "int8":
        return Int8Linear(weight, bias)
    if quantization == "fp8" and all(size % FP8_TILE == 0 for size in weight.shape):
        return Fp8Linear(weight, bias)
    return PackedLinear(weight, bias)
