"""Facts for the doctor's checks from a command line and a few keys of two config.json files."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from slime_spec.checkpoints.end_of_text import ReplyEnds
from slime_spec.checkpoints.folder import StoredTensor
from slime_spec.checkpoints.stored import Checkpoint
from slime_spec.launch.compose import Composed, composed
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity
from slime_spec.sglang.arguments import Place, server_flags
from slime_spec.sglang.interpreter import checked_in
from slime_spec.sglang.releases import release_of
from slime_spec.sglang.served import Difference

TARGET = {
    **{"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "max_position_embeddings": 8192},
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "vocab_size": 128256, "model_type": "llama"},
}
EAGLE3_HEAD = {
    **{"architectures": ["LlamaForCausalLMEagle3"], "torch_dtype": "bfloat16", "max_position_embeddings": 8192},
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "vocab_size": 128256, "draft_vocab_size": 32000, "model_type": "llama"},
}
MIMO = {**TARGET, "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
# A sound job on the SGLang engine: no check has a word against it.
SERVERS = (
    *("--rollout-engine", "sglang", "--rollout-num-gpus-per-engine", "1", "--actor-num-gpus", "1"),
    *("--sglang-dtype", "bfloat16", "--sglang-attention-backend", "fa3", "--sglang-max-running-requests", "64"),
    *("--sglang-mem-fraction-static", "0.8"),
)
CHAIN = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4")
TREE = ("--speculative-num-steps", "5", "--speculative-eagle-topk", "8", "--speculative-num-draft-tokens", "32")
PLAIN = SERVERS
ON_CPU = ("--rollout-num-gpus-per-engine", "0", "--actor-num-gpus", "0")
ROLLOUTS = "--debug-rollout-only"
MTP = (*SERVERS, "--speculative-algorithm", "EAGLE", *CHAIN)
LEARNING = "--enable-draft-training"


DRAFT = "draft"  # stands for the folder in what is composed, so that a command line is composed once


@cache
def composed_once(argv: tuple[str, ...]) -> Composed:
    return composed(argv)


def make_facts(
    folder: Path,
    argv: Sequence[str],
    target: Mapping[str, Any] = TARGET,
    draft: Mapping[str, Any] | None = None,
    *,
    version: str = "0.5.21",
    is_installed: bool = True,
    torch: str | None = None,
    tensors: Sequence[str] | None = None,
    model_types: Sequence[str] = (),
    gpu_bytes: tuple[int, ...] | None = None,
    silent_servers: tuple[str, ...] = (),
    differing: tuple[Difference, ...] = (),
    environ: Mapping[str, str] | None = None,
    acceptance: tuple[float, ...] = (),
    reply_ends: ReplyEnds | None = None,
    draft_embeds_otherwise: bool = False,
) -> Facts:
    """``tensors`` are names in the draft's file (the target's, where it drafts itself)."""
    own = Checkpoint.read(str(_folder(folder / "target", target)))
    head = None if draft is None else Checkpoint.read(str(_folder(folder / "draft", draft)))
    words = (*argv, *(("--speculative-draft-model-path", DRAFT) if head else ()))
    if tensors is not None:
        stored = {name: StoredTensor("bfloat16", (1,), 2) for name in tensors}
        head, own = (replace(head, tensors=stored), own) if head else (head, replace(own, tensors=stored))
    if head is not None and "STANDALONE" not in argv:
        head = head.as_draft()
    made = composed_once(words)
    composed = made.config
    config = replace(
        composed,
        model=replace(composed.model, hf_checkpoint=own.folder),
        speculative=replace(composed.speculative, draft_model_path=head.folder) if head else composed.speculative,
    )
    if head is None and config.speculative.algorithm in ("EAGLE", "NEXTN"):
        head = own
    flags = server_flags(config, 0, Place("127.0.0.1", 30000)) if config.rollout.engine == "sglang" else {}
    return Facts(
        config=config,
        given=made.given,
        target=own,
        draft=head,
        release=release_of(version, is_installed, torch, model_types),
        flags={} if silent_servers else flags,
        environ=environ or {},
        known_flags=checked_in() if is_installed else None,
        gpu_bytes=gpu_bytes,
        silent_servers=silent_servers,
        differing=differing,
        acceptance=acceptance,
        reply_ends=reply_ends,
        draft_embeds_otherwise=draft_embeds_otherwise,
    )


def _folder(path: Path, config: Mapping[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def python_with(folder: Path, **versions: str) -> Path:
    """An interpreter that finds these packages (``sglang="0.5.21"``), by their metadata alone."""
    site = folder / "site"
    for name, text in versions.items():
        info = site / f"{name}-{text}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {text}\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


@dataclass(frozen=True)
class Case:
    """A command line (and config.json keys); ``sees`` is None where the trap must be silent."""

    trap: str
    argv: tuple[str, ...]
    sees: Severity | None
    facts: Mapping[str, Any] = field(default_factory=dict)


def case(trap: str, argv: tuple[str, ...], sees: Severity | None = None, **facts: Any) -> Case:
    return Case(trap, argv, sees, facts)
