"""A linear layer whose weight is stored the way the CPU's matrix kernels read it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# oneDNN chooses the packed layout for about this many activation rows; decode and verify passes have 1 to 64.
ROWS_HINT = 4


def can_prepack(weight: torch.Tensor) -> bool:
    """Whether this build of torch has oneDNN's packed linear (private operators) for the weight's device and dtype."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class PackedLinear:
    """``y = x W^T + b`` with W [out, in]; on CPU the packed copy replaces the plain one.

    Packing matters for speculation: plain fp32 ``F.linear`` costs twice as much for two rows as for one, so that
    verification would cost double before it starts.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, prepack: bool = True) -> None:
        self._packed = prepack and can_prepack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT) if self._packed else weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return F.linear(x, self._weight, self.bias)

    def unpacked(self) -> torch.Tensor:
        """The weight [out, in] that the kernel computes with, bit for bit."""
        return self._weight.to_dense() if self._packed else self._weight

    def move(self, device: torch.device) -> None:
        """Move a plain weight (packed ones live on the CPU only)."""
        if not self._packed:
            self._weight = self._weight.to(device)
            self.bias = None if self.bias is None else self.bias.to(device)
