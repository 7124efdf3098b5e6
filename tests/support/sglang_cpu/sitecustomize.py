"""On PYTHONPATH of the test's SGLang server: lets PyPI's torchvision, built for CUDA, be imported beside a CPU torch.

Its compiled part does not load there, and its Python part then describes kernels of two operators that nobody has
defined. Their schemas are defined just before torchvision is imported.

And it makes starts short. SGLang's small functions of drafting run as they are written: where torch.compile is on, each
server compiles them anew when it drafts first, for ten seconds and more. And the garbage collector looks less often:
two of the ten CPU seconds that importing SGLang takes went into finding no garbage.
"""

import gc
import importlib.abc
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class TorchvisionSchemas(importlib.abc.MetaPathFinder):
    """Finds nothing; sees torchvision being looked for, once."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")  # the definitions live as long as this object
            for operator in ("nms", "qnms"):
                self.library.define(operator + SCHEMA)
            sys.modules[__name__].torchvision_schemas = self  # type: ignore[attr-defined]
        return None


os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
gc.set_threshold(100_000, 50, 50)
sys.meta_path.insert(0, TorchvisionSchemas())
