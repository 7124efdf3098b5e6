"""A GPU's passes on a CPU: the kernels' reference in their place, and graphs that are captured in name only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rollout.embedded import assemble, linear
from rollout.embedded.cuda.graphs import Captured, Graphs
from rollout.embedded.drafters import whole_model
from rollout.embedded.linear import Packing
from rollout.embedded.verification import draw
from tests.support import reference_operators
from tests.support.stand_in_device import uncounted

aten = torch.ops.aten
READS = {
    *(aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default),
    *(aten.nonzero.default, aten.equal.default),
}

KERNELS = ("add_and_norm", "norm_and_multiply", "multiply_and_add", "silu_times", "rotate_and_store", "attend")


class NoReads(TorchDispatchMode):
    """Refuses every operator whose result the host waits for: while a graph is captured CUDA refuses them, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS, f"{func} reads the device while a graph is captured"
        return func(*args, **(kwargs or {}))


class CpuCapturer:
    """Captures a run by keeping it: a replay runs it again, and puts the results where the first run's are."""

    def __init__(self) -> None:
        self.num_captured = self.num_replays = 0
        self.alive: WeakSet[Captured] = WeakSet()

    def capture(self, run: Callable[[], Any]) -> Captured:
        self.num_captured += 1
        with NoReads(), uncounted():
            outputs = run()

        def replay() -> None:
            self.num_replays += 1
            with torch.inference_mode(), uncounted():
                for kept, new in zip(tensors(outputs), tensors(run()), strict=True):
                    kept.copy_(new)

        captured = Captured(replay, outputs)
        self.alive.add(captured)
        return captured


def tensors(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        yield outputs
    else:
        for each in outputs:
            yield from tensors(each)


@contextmanager
def graphs_on_cpu() -> Iterator[CpuCapturer]:
    """Give every engine that is built meanwhile a GPU's passes."""
    from rollout.embedded.cuda import operators, products  # needs Triton, which most tests of an engine do without

    capturer = CpuCapturer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "make_graphs", lambda config, spec, device: Graphs(capturer))
        for name in KERNELS:
            patch.setattr(operators, name, getattr(reference_operators, name))
        patch.setattr(products, "choose_on", lambda device: lambda runs: list(runs)[-1])  # not the library's
        patch.setattr(draw, "is_read_free", lambda weights: False)
        for module in (linear, assemble, whole_model):
            patch.setattr(module, "best_packing", lambda device, dtype: Packing.PLAIN)
        yield capturer
