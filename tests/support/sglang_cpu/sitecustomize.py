"""On PYTHONPATH of the test's SGLang server: lets PyPI's torchvision, built for CUDA, be imported beside a CPU torch.

Its compiled part does not load there, and its Python part then describes kernels of two operators that nobody has
defined. Their schemas are defined just before torchvision is imported.
"""

import importlib.abc
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


sys.meta_path.insert(0, TorchvisionSchemas())
