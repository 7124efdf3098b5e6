"""Compute the target's features of every sequence once, and keep them in files for epochs and restarts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from slime_spec.draft.training.progress import Progress
from slime_spec.draft.training.sequence import DraftSequence
from slime_spec.draft.training.target import FrozenTarget, SequenceFeatures

BLOCK_SEQUENCES = 32
FORWARD_SEQUENCES = 16


class FeatureStore:
    """Stores one file per block of sequences, written whole or not at all.

    ``identity`` says what the features depend on besides the sequences (target, captured layers, dtype); a file of
    other sequences or another identity is computed again.
    """

    def __init__(self, folder: Path, target: FrozenTarget, identity: str, sequences: Sequence[DraftSequence]) -> None:
        self._folder, self._target, self._identity = folder, target, identity
        self._sequences = list(sequences)
        self._slot = {sequence.index: slot for slot, sequence in enumerate(sequences)}

    def compute(self, progress: Progress) -> None:
        """Compute and write every missing block."""
        self._folder.mkdir(parents=True, exist_ok=True)
        num_blocks = -(-len(self._sequences) // BLOCK_SEQUENCES)
        for block in range(num_blocks):
            progress.show("reading the target", block, num_blocks)
            if not self._is_current(block):
                self._write(block)
        progress.show("reading the target", num_blocks, num_blocks)

    def __getitem__(self, index: int) -> SequenceFeatures:
        """Return the features of the sequence with this corpus index; needs ``compute`` first."""
        block = self._slot[index] // BLOCK_SEQUENCES
        with safe_open(self._path(block), framework="pt") as file:
            return SequenceFeatures(
                **{each.name: file.get_tensor(f"{index}.{each.name}") for each in fields(SequenceFeatures)}
            )

    def _write(self, block: int) -> None:
        members = sorted(self._members(block), key=lambda each: len(each.token_ids))
        tensors = {}
        for start in range(0, len(members), FORWARD_SEQUENCES):
            part = members[start : start + FORWARD_SEQUENCES]
            for sequence, of_one in zip(part, self._target.features(part), strict=True):
                for each in fields(SequenceFeatures):
                    tensors[f"{sequence.index}.{each.name}"] = getattr(of_one, each.name)
        scratch = self._path(block).with_suffix(".partial")
        save_file(tensors, scratch, metadata={"fingerprint": self._fingerprint(block)})
        os.replace(scratch, self._path(block))

    def _is_current(self, block: int) -> bool:
        if not self._path(block).is_file():
            return False
        with safe_open(self._path(block), framework="pt") as file:
            return (file.metadata() or {}).get("fingerprint") == self._fingerprint(block)

    def _fingerprint(self, block: int) -> str:
        digest = xxhash.xxh3_128(self._identity.encode())
        for each in self._members(block):
            digest.update(f"{each.index}:{each.prompt_len}:{each.token_ids}".encode())
        return digest.hexdigest()

    def _members(self, block: int) -> list[DraftSequence]:
        return self._sequences[block * BLOCK_SEQUENCES : (block + 1) * BLOCK_SEQUENCES]

    def _path(self, block: int) -> Path:
        return self._folder / f"{block:05d}.safetensors"
