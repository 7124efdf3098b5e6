"""``Checkpoint`` is a folder as a plan reads it: config.json, and the headers of the weights if there are any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_spec.checkpoints.draft_writers import read_uniformly
from slime_spec.checkpoints.folder import CONFIG, TARGET_PATH, CheckpointFolder, StoredTensor, architecture_of
from slime_spec.checkpoints.quantization import CODES, SCALE


@dataclass(frozen=True)
class Checkpoint:
    """Holds a checkpoint that may be incomplete: a property that its config.json does not give is None.

    ``tensors`` is None where the folder has no weights (a plan needs none). ``named_by_its_writer`` is the architecture
    that a draft's config.json names where SGLang knows it by another, which ``config`` then has.
    """

    folder: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor] | None
    named_by_its_writer: str = ""

    @classmethod
    def read(cls, folder: str, setting: str = TARGET_PATH) -> Checkpoint:
        """Read ``folder``; raises CheckpointError naming ``setting``, or the file if it is damaged."""
        stored = CheckpointFolder(Path(folder), setting)
        return cls(folder, stored.config, stored.tensors_there)

    def as_draft(self) -> Checkpoint:
        """Return the checkpoint of a draft, whoever wrote it; raises CheckpointError as ``read_uniformly`` does."""
        config = read_uniformly(self.config, str(Path(self.folder) / CONFIG), self.tensors or ())
        return self if config is self.config else Checkpoint(self.folder, config, self.tensors, self.architecture)

    @property
    def architecture(self) -> str:
        return architecture_of(self.config)

    @property
    def dtype(self) -> str | None:
        """Return the dtype that config.json names, else that of most bytes of the weights that are no codes in fp8.

        None where neither is known.
        """
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if named is not None:
            return str(named).removeprefix("torch.")
        if not self.tensors:
            return None
        num_bytes: Counter[str] = Counter()
        for name, tensor in self.tensors.items():
            if tensor.dtype != CODES and not name.endswith(SCALE):
                num_bytes[tensor.dtype] += tensor.num_bytes
        return num_bytes.most_common(1)[0][0] if num_bytes else CODES

    @property
    def context_length(self) -> int | None:
        return self.config.get("max_position_embeddings")

    @property
    def vocab_size(self) -> int | None:
        return self.config.get("vocab_size")

    @property
    def num_mtp_layers(self) -> int:
        """Return the number of MTP layers in the checkpoint, under either of the two names that configurations have."""
        return int(self.config.get("num_nextn_predict_layers") or self.config.get("mtp_num_hidden_layers") or 0)

    @property
    def num_bytes(self) -> int | None:
        """Return the bytes of the weights on disk."""
        return None if self.tensors is None else sum(tensor.num_bytes for tensor in self.tensors.values())
