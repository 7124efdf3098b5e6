"""A push sends weights as the engines have them: in their dtype, or in fp8 where they have loaded fp8.

    engines that compute here, servers of numbers     X.weight in the engines' dtype
    servers that have loaded a checkpoint in fp8      X.weight in e4m3, X.weight_scale_inv: what they have loaded

A server keeps as codes what its checkpoint has as codes, so the checkpoint's own names say which weights those are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from slime_spec.checkpoints.families.experts import served_dtype
from slime_spec.checkpoints.folder import CheckpointFolder
from slime_spec.checkpoints.fp8 import quantised
from slime_spec.checkpoints.quantization import CODES, SCALE, SCALES, BlockScheme, coded_names, scheme_of_folder
from slime_spec.engines import kind_of
from slime_spec.weights.messages import TensorMeta

if TYPE_CHECKING:
    from slime_spec.config.tree import Config


@dataclass(frozen=True)
class ServedForm:
    """Says how engines have weights: in ``dtype``, those named in ``coded`` in fp8 with the blocks of ``scheme``."""

    dtype: str
    scheme: BlockScheme | None = None
    coded: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: Config, in_target: bool = True) -> ServedForm:
        """Return the form in which the engines of a run have its target, or a draft that is not ``in_target``."""
        dtype = config.engine.dtype
        if not in_target or not kind_of(config).has_servers:
            return cls(dtype)
        folder = CheckpointFolder(Path(config.model.hf_checkpoint))
        scheme = scheme_of_folder(folder)
        return cls(dtype) if scheme is None else cls(dtype, scheme, coded_names(folder.tensors))

    def metas(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[TensorMeta, ...]:
        """Return what a push of weights of these names and shapes announces, in their order."""
        return tuple(meta for name, shape in shapes.items() for meta in self._metas(name, shape))

    def tensors(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what a push of these weights sends, in their order."""
        for name, weight in weights:
            if self.scheme is None or name not in self.coded:
                yield name, weight.to(getattr(torch, served_dtype(name, self.dtype)))
                continue
            codes, scales = quantised(weight, self.scheme)  # of the trainer's numbers: rounded once
            yield name, codes
            yield name + SCALE, scales

    def _metas(self, name: str, shape: tuple[int, ...]) -> Iterator[TensorMeta]:
        if self.scheme is None or name not in self.coded:
            yield TensorMeta(name, shape, served_dtype(name, self.dtype))
            return
        yield TensorMeta(name, shape, CODES)
        yield TensorMeta(name + SCALE, self.scheme.scale_shape(shape), SCALES)
