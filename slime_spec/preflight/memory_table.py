"""This module shows the memory of GPUs by phase as a table of text, with the arithmetic of each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from slime_spec.preflight.gpu_memory import GB, GpuMemory, MemoryRow, Phase

NAME_WIDTH, CELL_WIDTH = 22, 9


def table_lines(gpus: Sequence[GpuMemory]) -> Iterator[str]:
    """Yield the lines of a table for each kind of GPU; sizes are in GB of 10^9 bytes."""
    for each in gpus:
        number = f"each of {each.num_gpus} GPUs" if each.num_gpus > 1 else "one GPU"
        yield f"{number} of {each.capacity_bytes / GB:.1f} GB, {each.holders} (GB)"
        yield _line("", list(each.phases), "")
        for row in each.rows:
            yield _line(row.name, [_cell(row, phase) for phase in each.phases], row.arithmetic)
        sums = [f"{each.total(phase) / GB:.1f}" for phase in each.phases]
        yield _line("sum", sums, "")
        if each.overfull:
            marks = ["too much" if phase in each.overfull else "" for phase in each.phases]
            yield _line("", marks, "")


def _cell(row: MemoryRow, phase: Phase) -> str:
    return f"{row.num_bytes / GB:.1f}" if phase in row.phases else "-"


def _line(name: str, cells: Sequence[str], arithmetic: str) -> str:
    columns = "".join(cell.rjust(CELL_WIDTH) for cell in cells)
    return f"{name.ljust(NAME_WIDTH)}{columns}  {arithmetic}".rstrip()
