"""``differences`` compares what a running server reports of itself with the settings of a run that did not start it.

A server reports its flags as it resolved them, by the dests of the table of flags; older releases report fewer. What a
server does not report is not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_spec.algorithms import NONE, reported_as
from slime_spec.checkpoints.folder import CONFIG, DRAFT_PATH, CheckpointFolder
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.sglang.arguments import config_of_engine, speculative_flags
from slime_spec.sglang.flags import PREFIX, engine_settings, sglang_flags

# What a server computes with, or what it can answer: each changes samples, or ends the run later.
DECISIVE = (
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "load_format",
    "context_length",
    "skip_tokenizer_init",
    "enable_deterministic_inference",
    "speculative_accept_threshold_single",
    "speculative_accept_threshold_acc",
)
RETURNS_EXPERTS = "enable_return_routed_experts"  # decisive where they are replayed
ALGORITHM, DRAFT = "speculative_algorithm", "speculative_draft_model_path"
DTYPES = {"half": "float16", "float": "float32", "bf16": "bfloat16"}  # SGLang's other names
# Keys of a checkpoint's config.json that say nothing of its tensors.
INCIDENTAL = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype"})


@dataclass(frozen=True)
class Difference:
    """Names a flag whose value at the server, ``theirs``, is not the run's, ``ours``.

    ``is_decisive`` says that samples would be others than the run asks for, or that the run would end for it.
    """

    dest: str
    ours: object
    theirs: object
    is_decisive: bool

    @property
    def flag(self) -> str:
        return f"--{self.dest.replace('_', '-')}"

    def told(self, address: str) -> str:
        """Return the difference as a line about the server at ``address``."""
        return f"external server {address} has {self.flag} {self.theirs}, not {self.ours}"

    def refusal(self, address: str) -> ConfigError:
        """Return the error about the server at ``address``, for a decisive difference."""
        setting = engine_settings().get(self.dest)
        path = f"sglang.{self.dest}" if setting is None else setting.path
        flag = self.flag if self.dest.startswith("speculative_") else PREFIX + self.flag.removeprefix("--")
        return ConfigError(
            path,
            f"must be what the server has: {address} was started with {self.flag} {self.theirs}",
            self.ours,
            f"Start that server with {self.flag} {self.ours}, or pass {flag} {self.theirs}.",
        )


def differences(config: Config, engine_index: int, reported: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield each flag that the server reports otherwise than the run has it; ``reported`` is its /server_info."""
    config = config_of_engine(config, engine_index)
    ours = expected_flags(config)
    for dest, value in ours.items():
        theirs = reported.get(dest)
        if dest not in reported or (theirs is None and dest not in (ALGORITHM, "quantization")):
            continue
        if not SAME.get(dest, _same)(value, theirs):
            is_decisive = dest in (*DECISIVE, RETURNS_EXPERTS) or dest.startswith("speculative_")
            yield Difference(dest, value, NONE.name if dest == ALGORITHM and theirs is None else theirs, is_decisive)


def expected_flags(config: Config) -> dict[str, object]:
    """Return the flags of a server that are the run's business: the decisive ones, and those that somebody has set."""
    table = sglang_flags()
    flags: dict[str, object] = {dest: table[dest].default for dest in DECISIVE if dest in table}
    flags |= speculative_flags(config.speculative, config.model.hf_checkpoint)
    flags |= {
        ALGORITHM: config.speculative.algorithm,
        "dtype": config.engine.dtype,
        "context_length": config.engine.context_length or config.longest,
        **{dest: value for dest, value in config.sglang.items() if value is not None},
    }
    if config.rollout.routing_replay:
        flags[RETURNS_EXPERTS] = True
    if "quantization" not in config.sglang and _is_quantized(config.model.hf_checkpoint):
        del flags["quantization"]  # the server finds the checkpoint's own scheme by itself
    return flags


def _is_quantized(folder: str) -> bool:
    return bool(CheckpointFolder(Path(folder)).config.get("quantization_config"))


def _same(ours: object, theirs: object) -> bool:
    return ours == theirs or str(ours) == str(theirs)


def _same_algorithm(ours: object, theirs: object) -> bool:
    return reported_as(str(theirs or NONE.name)) == reported_as(str(ours or NONE.name))


def _same_dtype(ours: object, theirs: object) -> bool:
    """Compare names; what a server makes of "auto" it does not report."""
    return theirs == "auto" or DTYPES.get(str(theirs), theirs) == DTYPES.get(str(ours), ours)


def _same_kv_dtype(ours: object, theirs: object) -> bool:
    """Compare names; "auto" is the model's own dtype, never one of fewer bits."""
    if ours == "auto":
        return theirs == "auto" or str(theirs) in (*DTYPES, *DTYPES.values())
    return _same_dtype(ours, theirs)


def _same_load_format(ours: object, theirs: object) -> bool:
    """Compare what is loaded: only "dummy", random weights, is no form of the checkpoint."""
    return (ours == "dummy") == (theirs == "dummy")


def _holds_context(ours: object, theirs: object) -> bool:
    return isinstance(theirs, int) and isinstance(ours, int) and theirs >= ours


def _same_draft(ours: object, theirs: object) -> bool:
    """Compare the drafts' configurations where this machine has both folders, else the folders' names."""
    own, other = Path(str(ours)), Path(str(theirs))
    if own.resolve() == other.resolve():
        return True
    if not (other / CONFIG).is_file():
        return own.name == other.name
    own_keys, other_keys = (CheckpointFolder(path, DRAFT_PATH).config for path in (own, other))
    return all(own_keys.get(key) == other_keys.get(key) for key in (own_keys.keys() | other_keys.keys()) - INCIDENTAL)


SAME: Mapping[str, Callable[[object, object], bool]] = {
    ALGORITHM: _same_algorithm,
    DRAFT: _same_draft,
    "dtype": _same_dtype,
    "kv_cache_dtype": _same_kv_dtype,
    "load_format": _same_load_format,
    "context_length": _holds_context,
}
