"""These layers of drafts are quantised (``--speculative-draft-model-quantization``): int8, or fp8 on a GPU that has it.

Rounding a draft moves how many of its tokens are accepted, never the output's distribution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rollout.embedded.drafters.fp8_blocks import from_fp8, to_fp8
from rollout.embedded.kernels.library import Kernels, LinearStruct, kernels
from rollout.embedded.kernels.memory import placed
from rollout.embedded.linear import PackedLinear, Packing


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
            panels = _panels(self._weight, library.panel_rows, 2 if self.dtype == torch.bfloat16 else 1)
            self._weight = placed(panels)
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
    """Stores e4m3 weights with a scale for each block (see ``fp8_blocks``); products run on a GPU alone.

    Activations keep the engine's dtype.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.packing = Packing.PLAIN
        self.bias, self.dtype = bias, weight.dtype
        self.num_outputs, self.num_inputs = weight.shape
        self._weight, self._scales = to_fp8(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x, self.dtype)

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x, torch.float32)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self.unpacked()[indices]

    def unpacked(self) -> torch.Tensor:
        return from_fp8(self._weight, self._scales).to(self.dtype)

    def move(self, device: torch.device) -> None:
        super().move(device)
        self._scales = self._scales.to(device)

    def _product(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        from rollout.embedded.cuda.fp8 import product  # needs Triton, which a CPU does without

        y = product(x.reshape(-1, self.num_inputs), self._weight, self._scales, self.bias, dtype)
        return y.view(*x.shape[:-1], self.num_outputs)


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None, quantization: str | None) -> PackedLinear:
    """Return a linear layer over ``weight`` [out, in], in the engine's best form or rounded."""
    if quantization == "int8":
        return Int8Linear(weight, bias)
    if quantization == "fp8":
        return Fp8Linear(weight, bias)
    return PackedLinear(weight, bias)
