"""A packed linear layer stores its weight in the layout that the CPU's matrix kernels read."""

from __future__ import annotations

from enum import Enum, auto

import torch
import torch.nn.functional as F

from rollout.embedded.kernels.library import DTYPE_CODES, Kernels, LinearStruct, kernels

# oneDNN chooses the packed layout for about this many activation rows; decode and verify passes have 1 to 64.
ROWS_HINT = 4


class Packing(Enum):
    """Names the layout of a weight in memory.

    PLAIN is [out, in], the only one on CUDA. NATIVE belongs to our own kernels, ONEDNN to torch's where ours cannot be
    built: plain fp32 ``F.linear`` on a CPU costs twice as much for two rows as for one, so that verification would cost
    double before it starts.
    """

    PLAIN = auto()
    ONEDNN = auto()
    NATIVE = auto()


def best_packing(device: torch.device, dtype: torch.dtype) -> Packing:
    """Return the fastest packing for weights of this dtype on this device that this machine can run."""
    if device.type != "cpu":
        return Packing.PLAIN
    if dtype in DTYPE_CODES and kernels() is not None:
        return Packing.NATIVE
    return Packing.ONEDNN if _has_onednn(dtype) else Packing.PLAIN


def _has_onednn(dtype: torch.dtype) -> bool:
    """Return whether this build of torch has oneDNN's packed linear (private operators) for the dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class PackedLinear:
    """Computes ``y = x W^T + b`` with W [out, in]; a packed copy replaces the plain W.

    Without a ``packing`` the best one for the weight's device and dtype is taken; ``library`` is what NATIVE runs on.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        packing: Packing | None = None,
        library: Kernels | None = None,
    ) -> None:
        self.packing = best_packing(weight.device, weight.dtype) if packing is None else packing
        self.bias, self.dtype = bias, weight.dtype
        self.num_outputs, self.num_inputs = weight.shape
        match self.packing:
            case Packing.NATIVE:
                self.library = library or _library()
                self._weight = self.library.pack(weight)
                bias_pointer = None if bias is None else bias.data_ptr()
                self.struct = LinearStruct(self._weight.data_ptr(), bias_pointer, None, *weight.shape)
            case Packing.ONEDNN:
                self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
            case Packing.PLAIN:
                self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        match self.packing:
            case Packing.NATIVE:
                return self._native(x, wide=False)
            case Packing.ONEDNN:
                return torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
            case Packing.PLAIN:
                return F.linear(x, self._weight, self.bias)

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``y`` in fp32, unrounded where the kernel allows it; logits are computed so."""
        return self._native(x, wide=True) if self.packing is Packing.NATIVE else self(x).float()

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Return rows of W, [indices, in], for int64 ``indices``; NATIVE gathers them, ONEDNN unpacks W first."""
        if self.packing is Packing.NATIVE:
            return self.library.rows(self._weight, self.num_inputs, self.dtype, indices.contiguous())
        return F.embedding(indices, self.unpacked())

    def unpacked(self) -> torch.Tensor:
        """Return the weight [out, in] that the kernel computes with, bit for bit."""
        match self.packing:
            case Packing.NATIVE:
                return self.rows(torch.arange(self.num_outputs))
            case Packing.ONEDNN:
                return self._weight.to_dense()
            case Packing.PLAIN:
                return self._weight

    def plain_tensors(self) -> list[torch.Tensor]:
        """Return the weight, and the bias if there is one, of a plain layer."""
        assert self.packing is Packing.PLAIN, "packed weights have no address to keep"
        return [self._weight] if self.bias is None else [self._weight, self.bias]

    def move(self, device: torch.device) -> None:
        """Move a plain weight (packed ones live on the CPU only)."""
        if self.packing is Packing.PLAIN:
            self._weight = self._weight.to(device)
            self.bias = None if self.bias is None else self.bias.to(device)

    def _native(self, x: torch.Tensor, wide: bool) -> torch.Tensor:
        flat = x.reshape(-1, self.num_inputs).contiguous()
        return self.library.linear(self.struct, flat, wide).view(*x.shape[:-1], self.num_outputs)


def _library() -> Kernels:
    library = kernels()
    assert library is not None, "native packing was asked for where there are no kernels"
    return library
