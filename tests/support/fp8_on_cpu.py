"""Drafts in fp8 where there is no GPU: the engine takes them, and the kernel's reference multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from rollout.embedded import drafters
from rollout.embedded.drafters.fp8_blocks import from_fp8
from slime_spec.checkpoints import draft_choice


@contextmanager
def fp8_on_cpu() -> Iterator[None]:
    """Let engines on a CPU have drafts in fp8."""
    from rollout.embedded.cuda import fp8  # needs Triton, which most tests of an engine do without

    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(fp8, "product", product)
        patch.setattr(draft_choice, "check_quantization", lambda config: None)
        patch.setattr(drafters, "check_fp8", lambda capability: None)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        yield


def product(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """What the kernel computes: the weights unpacked, and a product in fp64."""
    y = x.double() @ from_fp8(weight, scales).double().T
    return (y if bias is None else y + bias.double()).to(dtype)
