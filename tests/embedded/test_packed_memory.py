"""Weights lie in huge pages, side by side, and a slab is used again when nothing lies in it any more."""

import gc
import mmap
from pathlib import Path

import pytest
import torch

from rollout.embedded.kernels.memory import ALIGNMENT, HUGE_PAGE, SLAB_BYTES, PackedMemory, placed

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages are asked for on Linux alone")


def address_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size()


def test_tensors_lie_side_by_side_and_none_in_another() -> None:
    memory = PackedMemory()
    sizes = [1, 64, 65, 1000, SLAB_BYTES // 2, SLAB_BYTES // 2, SLAB_BYTES + 5, 3]
    taken = [memory.take(size) for size in sizes]
    for number, tensor in enumerate(taken):
        tensor.fill_(number)
    assert [tensor.numel() for tensor in taken] == sizes
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(taken))
    assert all(address_of(tensor) % ALIGNMENT == 0 for tensor in taken)
    assert address_of(taken[0]) % HUGE_PAGE == 0
    assert address_of(taken[2]) == address_of(taken[1]) + 64


def test_the_system_is_asked_for_huge_pages() -> None:
    tensor = PackedMemory().take(3 * HUGE_PAGE)
    start, flags = address_of(tensor), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            first, _, end = words[0].partition("-")
            is_ours = int(first, 16) <= start < int(end, 16)
        elif words[0] == "VmFlags:" and is_ours:
            flags = line
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    assert "hg" in flags.split()


def test_a_slab_is_used_again_when_its_last_tensor_is_gone_and_not_before() -> None:
    memory = PackedMemory()
    first, second = memory.take(SLAB_BYTES // 2), memory.take(SLAB_BYTES // 2)
    start = address_of(first)
    third = memory.take(SLAB_BYTES)  # in a slab of its own
    part = second[7:9].view(2)
    del first, second
    gc.collect()
    assert address_of(memory.take(SLAB_BYTES)) not in (start, address_of(third)), "a view lies in it"
    part.fill_(3)
    del part
    gc.collect()
    again = memory.take(SLAB_BYTES)
    assert address_of(again) == start
    again.fill_(1)
    assert int(again.sum(dtype=torch.int64)) == SLAB_BYTES


def test_tensors_are_copied_whole() -> None:
    for dtype in (torch.int8, torch.float32):
        tensor = (100 * torch.randn(7, 5, 3)).to(dtype)
        copy = placed(tensor)
        assert copy.dtype == dtype
        assert torch.equal(copy, tensor)
