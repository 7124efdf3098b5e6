"""A tensor has one checksum, wherever it is computed."""

import importlib
import os

import numpy as np
import pytest
import torch
import xxhash

from slime_spec.weights.checksums import (
    CHUNK_BYTES,
    as_bytes,
    device_digests,
    host_digests,
    tensor_checksum,
    tensor_checksums,
)
from slime_spec.weights.xxh3 import added_up, chunk_digests


@pytest.mark.parametrize("num_bytes", [1024, 2048, 5120, CHUNK_BYTES])
def test_the_operations_for_a_device_compute_the_published_hash(num_bytes: int) -> None:
    inputs = [bytes(num_bytes), b"\xff" * num_bytes, *(os.urandom(num_bytes) for _ in range(20))]
    rows = torch.stack([torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in inputs])
    digests = chunk_digests(rows.split([2, 1, 19]))
    assert [digest % 2**64 for digest in digests.tolist()] == [xxhash.xxh3_64_intdigest(each) for each in inputs]


@pytest.mark.parametrize("start", [0, 16, 8, 3])
def test_device_and_host_digest_tensors_of_any_size_and_place_alike(start: int) -> None:
    sizes = [1, 0, CHUNK_BYTES, CHUNK_BYTES + 2, 5 * CHUNK_BYTES - 1, 7]
    flat = [torch.frombuffer(bytearray(os.urandom(start + size + 1)), dtype=torch.uint8)[start:-1] for size in sizes]
    for on_device, each in zip(device_digests(flat), flat, strict=True):
        assert np.array_equal(on_device, host_digests(each))


@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1)",
)
def test_the_kernel_adds_up_what_torch_adds_up() -> None:
    pytest.importorskip("triton")
    kernel = importlib.import_module("slime_spec.weights.xxh3_kernel")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for num_bytes in (1024, 3072, CHUNK_BYTES):
        parts = torch.randint(0, 256, (6, num_bytes), dtype=torch.uint8, device=device).split([1, 3, 2])
        assert torch.equal(chunk_digests(parts, kernel.added_up), chunk_digests(parts, added_up))


def test_zeros_at_the_end_are_not_the_zeros_that_fill_a_chunk() -> None:
    assert tensor_checksum(torch.zeros(3)) != tensor_checksum(torch.zeros(4))
    assert tensor_checksum(torch.zeros(0)) != tensor_checksum(torch.zeros(1))


def test_the_checksum_is_of_the_bytes_in_the_tensors_own_order() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert tensor_checksum(matrix.T) == tensor_checksum(matrix.T.contiguous()) != tensor_checksum(matrix)
    assert tensor_checksum(matrix) == tensor_checksum(as_bytes(matrix))
    assert tensor_checksums([matrix, matrix.T]) == (tensor_checksum(matrix), tensor_checksum(matrix.T))


@pytest.mark.parametrize("position", [0, CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 4])
def test_one_changed_bit_anywhere_changes_the_checksum(position: int) -> None:
    data = torch.zeros(2 * CHUNK_BYTES + 5, dtype=torch.uint8)
    before = tensor_checksum(data)
    data[position] ^= 64
    assert tensor_checksum(data) != before
