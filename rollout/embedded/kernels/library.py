"""Typed Python calls run the compiled kernels; they pass pointers, copy nothing, and hold no GIL."""

from __future__ import annotations

import ctypes
import logging
import os
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from rollout.embedded.kernels.build import BuildError, build_library
from rollout.embedded.kernels.memory import PACKED_MEMORY
from slime_spec.errors import ConfigError

logger = logging.getLogger(__name__)

MODE_VARIABLE = "SLIME_SPEC_KERNELS"
MODES = ("auto", "native", "torch")  # native fails where the kernels cannot be built, torch never uses them
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


class LinearStruct(Structure):
    """Mirrors the C struct ``Linear`` of linear.h."""

    _fields_ = (
        ("packed", c_void_p),
        ("bias", c_void_p),
        ("scales", c_void_p),
        ("num_outputs", c_int64),
        ("num_inputs", c_int64),
    )


class BlockStruct(Structure):
    """Mirrors the C struct ``Block`` of blocks.h."""

    _fields_ = (
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", LinearStruct),
        ("out", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
    )


class BlocksStruct(Structure):
    """Mirrors the C struct ``Blocks`` of blocks.h."""

    _fields_ = (
        ("dtype", c_int32),
        ("hidden", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("intermediate", c_int32),
        ("num_blocks", c_int32),
        ("eps", c_float),
        ("cosines", c_void_p),
        ("signed_sines", c_void_p),
        ("blocks", POINTER(BlockStruct)),
    )


class PassStruct(Structure):
    """Mirrors the C struct ``Pass`` of blocks.h."""

    _fields_ = (
        ("num_tokens", c_int32),
        ("num_spans", c_int32),
        ("spans", c_void_p),
        ("parents", c_void_p),
        ("own", c_void_p),
        ("prefix", c_void_p),
    )


class StreamStruct(Structure):
    """Mirrors the C struct ``Stream`` of blocks.h."""

    _fields_ = (
        ("x", c_void_p),
        ("attention", c_void_p),
        ("hidden", c_void_p),
        ("features", c_void_p),
        ("captured", c_void_p),
        ("num_captured", c_int32),
    )


class Kernels:
    """Calls one loaded library; its tensors are contiguous CPU tensors, all of one dtype of ``DTYPE_CODES``."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.kernels_packed_bytes.argtypes = (c_int64, c_int64, c_int)
        self._library.kernels_packed_bytes.restype = c_int64
        self._library.kernels_panel_rows.restype = c_int64
        self._library.kernels_pack.argtypes = (c_void_p, c_int64, c_int64, c_int, c_void_p)
        self._library.kernels_rows.argtypes = (c_void_p, c_int64, c_int, c_void_p, c_int64, c_void_p)
        self._library.kernels_linear.argtypes = (c_void_p, c_int, c_void_p, c_int64, c_int64, c_void_p, c_int, c_int)
        self._library.kernels_rms_norm.argtypes = (c_void_p, c_int64, c_int64, c_void_p, c_float, c_int, c_void_p)
        self._library.kernels_run.argtypes = (c_void_p, c_void_p, c_void_p, c_int)
        self._library.kernels_race.argtypes = (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int)

    @property
    def panel_rows(self) -> int:
        """Return the number of rows of W in a panel."""
        rows: int = self._library.kernels_panel_rows()
        return rows

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the panels of ``weight`` [out, in], as bytes."""
        plain, code = weight.contiguous(), DTYPE_CODES[weight.dtype]
        packed = PACKED_MEMORY.take(self._library.kernels_packed_bytes(*weight.shape, code))
        self._library.kernels_pack(plain.data_ptr(), *weight.shape, code, packed.data_ptr())
        return packed

    def rows(self, packed: torch.Tensor, num_inputs: int, dtype: torch.dtype, rows: torch.Tensor) -> torch.Tensor:
        """Return rows ``rows`` (int64, contiguous) of the packed matrix, [rows, in]."""
        out = torch.empty(rows.numel(), num_inputs, dtype=dtype)
        self._library.kernels_rows(
            packed.data_ptr(), num_inputs, DTYPE_CODES[dtype], rows.data_ptr(), rows.numel(), out.data_ptr()
        )
        return out

    def linear(self, linear: LinearStruct, x: torch.Tensor, wide: bool) -> torch.Tensor:
        """Map x [tokens, in] to [tokens, out], in x's dtype or, ``wide``, in fp32."""
        if x.dtype == torch.bfloat16 and x.shape[1] % 2:
            x = torch.nn.functional.pad(x, (0, 1))  # the kernel reads bf16 in pairs
        out = torch.empty(x.shape[0], linear.num_outputs, dtype=torch.float32 if wide else x.dtype)
        self._library.kernels_linear(
            ctypes.addressof(linear),
            DTYPE_CODES[x.dtype],
            x.data_ptr(),
            x.shape[1] * x.itemsize,
            x.shape[0],
            out.data_ptr(),
            wide,
            torch.get_num_threads(),
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x [tokens, width] over its root mean square, times ``weight``."""
        out = torch.empty_like(x)
        self._library.kernels_rms_norm(
            x.data_ptr(), *x.shape, weight.data_ptr(), eps, DTYPE_CODES[x.dtype], out.data_ptr()
        )
        return out

    def run(self, blocks: BlocksStruct, one_pass: PassStruct, stream: StreamStruct) -> None:
        """Run decoder blocks over a pass."""
        self._library.kernels_run(
            ctypes.addressof(blocks), ctypes.addressof(one_pass), ctypes.addressof(stream), torch.get_num_threads()
        )

    def race(self, weights: torch.Tensor, keys: npt.NDArray[np.uint64], token_ids: torch.Tensor | None) -> torch.Tensor:
        """Return the winning column of every row of fp32 ``weights``; see verification.race."""
        racers, keys = weights.contiguous(), np.ascontiguousarray(keys)
        names = None if token_ids is None else token_ids.to(torch.int64).contiguous()
        winners = torch.empty(racers.shape[0], dtype=torch.int64)
        self._library.kernels_race(
            racers.data_ptr(),
            *racers.shape,
            keys.ctypes.data,
            None if names is None else names.data_ptr(),
            winners.data_ptr(),
            torch.get_num_threads(),
        )
        return winners


@lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """Return the library for this machine; None where it cannot be had or ``SLIME_SPEC_KERNELS=torch`` forbids it."""
    mode = os.environ.get(MODE_VARIABLE, "auto")
    if mode not in MODES:
        raise ConfigError(MODE_VARIABLE, f"must be one of {', '.join(MODES)}", mode, "Unset it for the default, auto.")
    if mode == "torch":
        return None
    try:
        return Kernels(build_library())
    except (BuildError, OSError) as error:
        if mode == "native":
            raise
        logger.warning("kernels not built, torch's slower operators used instead reason=%s", error)
        return None
