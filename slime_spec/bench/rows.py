"""Every benchmark writes its figures as rows."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from rollout.embedded.kernels.library import kernels
from slime_spec.algorithms import EAGLE3, NGRAM, NONE, STANDALONE
from slime_spec.run_folder import versions

# The packages that figures depend on; the JSON has all packages.
MARKDOWN_PACKAGES = ("torch", "transformers", "ray", "megatron-core")
HOLDS = {True: "yes", False: "NO", None: ""}


@dataclass(frozen=True)
class Row:
    """Holds one figure: ``Row("push.ratio", "push / plain copy", 2.1, "x", reach="<= 3", holds=True)``.

    ``holds`` is None without a bound. A figure that could not be measured is NaN, and ``what`` gives the reason.
    """

    id: str
    what: str
    value: float
    unit: str
    reach: str = ""
    holds: bool | None = None


def at_least(id: str, what: str, value: float, unit: str, bound: float) -> Row:
    return Row(id, what, value, unit, f">= {bound:g}", value >= bound)


def at_most(id: str, what: str, value: float, unit: str, bound: float) -> Row:
    return Row(id, what, value, unit, f"<= {bound:g}", value <= bound)


def below(id: str, what: str, value: float, unit: str, bound: float) -> Row:
    return Row(id, what, value, unit, f"< {bound:g}", value < bound)


def left_out_rows(prefix: str, names: Sequence[str]) -> list[Row]:
    """Return a row that names the measurements which there was no time for, if any."""
    what = f"measurements left out for want of time: {', '.join(names)}"
    return [Row(f"{prefix}.left_out", what, float(len(names)), "measurements")] if names else []


@dataclass(frozen=True)
class BenchOptions:
    """Holds the options of one call of a benchmark; every part reads the options it needs."""

    parts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    model_shape: str | None = None
    model: Path = Path("models/SmolLM2-135M-Instruct")
    policy: Path | None = None
    rule: str = "target_only"
    runs: tuple[Path, ...] = ()
    num_rounds: int = 5
    num_new_tokens: int = 64
    threads: int | None = None
    draft: str = "builtin:smollm2-135m-eagle3"
    peers: Path = Path("~/.cache/slime_spec/peers")
    install_peers: bool = False
    json: Path | None = None
    markdown: Path | None = None
    chart: Path | None = None
    sglang_python: str | None = None
    algorithms: tuple[str, ...] = (NONE.name, NGRAM.name, STANDALONE.name, EAGLE3.name)
    dtype: str = "float32"
    num_gpus: int | None = None
    attention_backend: str | None = None
    num_prompts: int = 8
    batch_sizes: tuple[int, ...] = (1, 8, 32, 64)
    dtypes: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    count: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark is named parts, each a ``package.module:function`` from BenchOptions to rows.

    ``prepare`` refuses options that would fail in a part, and sets what must be set before the parts are imported.
    ``add_flags`` adds flags that only this benchmark has; their names are those of BenchOptions' fields.
    """

    what: str
    parts: Mapping[str, str]
    prepare: Callable[[BenchOptions], None]
    add_flags: Callable[[ArgumentParser], None]
    defaults: BenchOptions = BenchOptions()


def rows_table(rows: Sequence[Row]) -> Table:
    table = Table()
    table.add_column("id", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("reach", no_wrap=True)
    table.add_column("holds")
    for row in rows:
        table.add_row(row.id, row.what, shown(row.value, row.unit, row.holds), row.reach, HOLDS[row.holds])
    return table


def shown(value: float | None, unit: str, holds: bool | None) -> str:
    """Return a figure as tables show it. Example: ``shown(2.0831, "x", True) == "2.083 x"``"""
    if value is not None and math.isfinite(value):
        return f"{value:.4g} {unit}"
    return "not measured" if holds is None and not unit else f"not finite {unit}"


def report_json(rows: Sequence[Row], command: Sequence[str], seeds: Sequence[int], on_gpu: bool = False) -> str:
    """Return the rows with everything needed to repeat them; a value that is NaN or infinite is null.

    ``on_gpu`` says whether they were measured on this machine's GPU, which ``machine`` then describes.
    """
    return json.dumps(
        {
            "rows": [{**asdict(row), "value": row.value if math.isfinite(row.value) else None} for row in rows],
            "machine": {**machine(), "gpu": gpu() if on_gpu else None},
            "versions": versions(),
            "seeds": list(seeds),
            "command": shlex.join(command),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        indent=2,
        allow_nan=False,
    )


def report_markdown(report: str) -> str:
    """Return ``report_json``'s result as a Markdown table under the machine, the versions and the command."""
    data: dict[str, Any] = json.loads(report)
    at, packages, git = data["machine"], data["versions"]["packages"], data["versions"]["git"]
    revision = f"{git['revision'][:12]}{' with local changes' if git['dirty'] else ''}" if git else "unknown"
    lines = [
        f"- machine: {at['processor']}, {at['cores']} cores, {at['memory_bytes'] / 1e9:.1f} GB, "
        f"{at['torch_threads']} torch threads, {at['engine_kernels']} kernels",
        *([f"- GPU: {_gpu_words(at['gpu'])}"] if at["gpu"] else []),
        f"- versions: {', '.join(f'{name} {packages[name]}' for name in MARKDOWN_PACKAGES)}, "
        f"Python {data['versions']['python']}; revision {revision}",
        f"- seeds: {', '.join(map(str, data['seeds']))}; date: {data['date']}",
        f"- command: `{data['command']}`",
        "",
        "| id | what | value | reach | holds |",
        "|---|---|---:|---|---|",
    ]
    for row in data["rows"]:
        value = shown(row["value"], row["unit"], row["holds"])
        cells = (f"`{row['id']}`", row["what"], value, row["reach"], HOLDS[row["holds"]])
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _gpu_words(about: Mapping[str, Any]) -> str:
    memory = f"{about['memory_bytes'] / 1e9:.1f} GB"
    return f"{about['name']}, {memory}, CUDA {about['cuda']} of torch, driver {about['driver']}"


def gpu() -> dict[str, object]:
    """Return the first GPU's name, memory and compute capability, the CUDA version of torch, and the driver's.

    Example: ``{"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85017493504, "capability": "9.0", "cuda": "13.0",
    "driver": "580.65.06"}``; the driver is None where the machine does not tell.
    """
    found, driver = torch.cuda.get_device_properties(0), Path("/proc/driver/nvidia/version")
    versions_of_driver = re.findall(r"\s(\d+(?:\.\d+)+)\s", driver.read_text()) if driver.exists() else []
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
        "driver": versions_of_driver[0] if versions_of_driver else None,
    }


def machine() -> dict[str, object]:
    """Return this machine's processor, cores and memory, this process's threads, and the engine's kernels."""
    cpu_info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "torch_threads": torch.get_num_threads(),
        "engine_kernels": "torch" if kernels() is None else "native",
    }
