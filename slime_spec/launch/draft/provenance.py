"""The file provenance.json beside a trained draft records its command, its inputs and its quality."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from slime_spec.checkpoints.folder import SINGLE
from slime_spec.draft.training.sequence import DraftSequence
from slime_spec.draft.training.trainer import DraftTrainer
from slime_spec.files import write_whole
from slime_spec.launch.draft.corpus_settings import CORPUS_FILE
from slime_spec.launch.draft.options import DraftOptions
from slime_spec.weights.checksums import combined_checksum, tensor_checksum

PROVENANCE = "provenance.json"
PACKAGES = ("slime_spec", "torch", "transformers", "safetensors", "tokenizers")
OWN_REPLIES = "the target's own replies"
FILES_REPLIES = "the replies of a file of conversations, whose licence counts too"


@dataclass(frozen=True)
class DraftStart:
    """Names the draft whose weights a training began with, and the ``checksum`` of its tensors."""

    name: str
    checksum: str


def write_provenance(
    options: DraftOptions,
    command: Sequence[str],
    target_checksum: str,
    start: DraftStart | None,
    split: tuple[Sequence[DraftSequence], Sequence[DraftSequence]],
    trainer: DraftTrainer,
    held_out: Mapping[str, object],
) -> None:
    """Write ``options.out``/provenance.json; the checkpoint is already there."""
    weights = options.out / SINGLE
    record = {
        "command": shlex.join(word for word in command if word != "--resume"),  # this command makes the draft again
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "sha256": {SINGLE: file_sha256(weights), CORPUS_FILE: file_sha256(options.out / CORPUS_FILE)},
        "bytes": weights.stat().st_size,
        "num_parameters": sum(each.numel() for each in trainer.model.network.parameters()),
        "target": {"name": options.target.resolve().name, "checksum": target_checksum},
        "draft": None if start is None else asdict(start),
        "corpus": {**_jsonable(asdict(options.corpus)), **_sizes(*split)},
        "training": {
            **asdict(trainer.settings),
            "updates": trainer.step_number,
            "updates_planned": trainer.num_updates,
            "draft_vocab_coverage": round(trainer.model.vocabulary.coverage(split[1]), 5),
        },
        "held_out": held_out,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "licence": _licence(options, start),
    }
    write_whole(options.out / PROVENANCE, json.dumps(record, indent=2) + "\n")


def _licence(options: DraftOptions, start: DraftStart | None) -> str:
    replies = OWN_REPLIES if options.corpus.conversations is None else FILES_REPLIES
    if start is None:
        return f"Trained on {replies}, from first weights taken from the target: use it under the target's licence."
    return f"Trained on {replies}, from the weights of a draft: use it under the licences of target and draft."


def tensors_checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return one digest of a checkpoint's tensors, names and bytes."""
    return combined_checksum((name, tensor_checksum(tensor)) for name, tensor in tensors.items())


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sizes(learned: Sequence[DraftSequence], held_out: Sequence[DraftSequence]) -> dict[str, object]:
    return {
        "num_sequences": len(learned),
        "num_held_out_sequences": len(held_out),
        "num_reply_tokens": sum(len(each.reply) for each in learned),
        "num_sequences_by_kind": dict(sorted(Counter(each.kind for each in learned).items())),
    }


def _jsonable(values: Mapping[str, object]) -> dict[str, object]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
