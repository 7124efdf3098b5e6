"""A training starts from its target's last block, or from the weights of a draft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from slime_spec.checkpoints.draft_location import BUILTIN, builtin_folder
from slime_spec.checkpoints.draft_spec import DraftSpec, draft_config, is_trainable
from slime_spec.checkpoints.draft_tensors import DraftCheckpoint, load_draft, with_stored_embedding
from slime_spec.checkpoints.families.dflash import default_capture_layers as default_block_layers
from slime_spec.checkpoints.families.dspark import VANILLA
from slime_spec.checkpoints.families.eagle3 import default_capture_layers
from slime_spec.checkpoints.families.qwen3 import QWEN3
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.draft.build import load_network, make_network
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.training.sequence import DraftSequence
from slime_spec.draft.training.target import FrozenTarget
from slime_spec.draft.training.vocabulary import DraftVocabulary
from slime_spec.draft.training.warm_start import warm_start
from slime_spec.errors import ConfigError
from slime_spec.launch.draft.options import BLOCK_KINDS, DRAFT_VOCAB_SIZE, DraftOptions
from slime_spec.launch.draft.provenance import tensors_checksum

# What a new draft has where no option says it.
BLOCK_LAYERS, BLOCK_SIZE, MARKOV_RANK, NUM_STEPS = 2, 8, 64, 5


class StartOptions(Protocol):
    """Names a draft to begin with, and how it is read."""

    @property
    def target(self) -> Path: ...

    @property
    def draft(self) -> str | None: ...

    @property
    def norm_output_convention(self) -> str: ...

    @property
    def draft_vocab_size(self) -> int | None: ...


def load_start(options: StartOptions, target: ModelSpec) -> DraftCheckpoint | None:
    """Read the draft of ``--draft``; None for a new one. Raises ConfigError for what cannot be trained."""
    if options.draft is None:
        return None
    folder = Path(builtin_folder(options.draft) if options.draft.startswith(BUILTIN) else options.draft)
    spec = DraftSpec.from_folder(folder, target, options.norm_output_convention)
    if not is_trainable(spec):
        rule = f"is a draft that cannot be trained: {spec.block.num_layers} layers in the format {spec.family}"
        raise ConfigError("--draft", rule, options.draft, "Pass another draft, or none.")
    if DraftSpec.from_dict(draft_config(spec), target) != replace(spec, in_target=False):
        rule = "is a draft that no folder of its own can hold as it is, an MTP layer with biases for instance"
        raise ConfigError("--draft", rule, options.draft, "Train it in a run: --enable-draft-training.")
    if spec.has_own_head and options.draft_vocab_size is not None:
        flag, rule = "--draft-vocab-size", "is that of the draft to train on, whose head has a row for each token"
        raise ConfigError(flag, rule, options.draft_vocab_size, f"Drop {flag}, or --draft.")
    _check_layers(spec, target, "--draft", "Train it in a run, which reads the state itself: --enable-draft-training.")
    return load_draft(folder, with_stored_embedding(folder, spec, options.target))


def draft_spec(options: DraftOptions, target: ModelSpec) -> DraftSpec:
    """Return the shape of a new draft, checked like a loaded one's; raises ConfigError for impossible sizes."""
    assert options.draft_vocab_size is not None, "options give the shape of a new draft"
    block = replace(
        target,
        num_layers=1,
        intermediate_size=options.intermediate_size or target.intermediate_size,
        tie_word_embeddings=False,
    )
    if options.draft_vocab_size > target.vocab_size:
        raise ConfigError(
            "--draft-vocab-size",
            f"must be at most {target.vocab_size}, the target's",
            options.draft_vocab_size,
            "Pass a smaller one.",
        )
    if options.kind == "mtp":
        spec = DraftSpec("mtp", block, target.hidden_size, target.vocab_size, hidden_first=True, recurrent_norm=True)
        spec = replace(spec, zero_first_embedding=True)
    elif options.kind in BLOCK_KINDS:
        spec = _block_spec(options, target, block)
    elif options.kind == "eagle":
        spec = DraftSpec("eagle", block, target.hidden_size, target.vocab_size, logits_norm=False)
    else:
        layers = options.capture_layers or capture_layers_of(target.num_layers)
        spec = DraftSpec(
            "eagle3", block, target.hidden_size, options.draft_vocab_size, capture_layers=layers, has_own_head=True
        )
    spec = DraftSpec.from_dict(draft_config(spec), target, source="the draft")
    _check_layers(spec, target, "--capture-layers", "Leave the last layer out.")
    return spec


def _check_layers(spec: DraftSpec, target: ModelSpec, flag: str, remedy: str) -> None:
    """Refuse the last layer: what transformers says of it is after the final norm, and engines read it before."""
    if target.num_layers - 1 in spec.capture_layers and target.num_layers > 1:
        rule = "must read layers before the last: its output is not read alike everywhere, and by SGLang not at all"
        raise ConfigError(flag, rule, list(spec.capture_layers), remedy)


def _block_spec(options: DraftOptions, target: ModelSpec, block: ModelSpec) -> DraftSpec:
    num_layers = options.num_layers or BLOCK_LAYERS
    layers = default_block_layers(target.num_layers, num_layers)
    is_deep_enough = min(layers) >= 0 and max(layers) < target.num_layers - 1 and sorted(set(layers)) == list(layers)
    is_dspark = options.kind == "dspark"
    return DraftSpec(
        "dspark" if is_dspark else "dflash",
        replace(block, architecture=QWEN3.architecture, num_layers=num_layers, qk_norm=True, qkv_bias=False),
        target.hidden_size,
        target.vocab_size,
        capture_layers=options.capture_layers or (layers if is_deep_enough else capture_layers_of(target.num_layers)),
        block_size=options.block_size or BLOCK_SIZE,
        drafts_from_root=is_dspark,
        markov_rank=(options.markov_rank or MARKOV_RANK) if is_dspark else 0,
        markov_kind=options.markov_kind or VANILLA,
        mask_token_id=target.vocab_size - 1 if options.mask_token_id is None else options.mask_token_id,
        num_target_layers=target.num_layers,
    )


def num_steps_of(options: DraftOptions, spec: DraftSpec) -> int:
    """Return the draft positions that the training unrolls; raises ConfigError for more than a block has."""
    most = spec.num_block_drafts or options.num_steps or NUM_STEPS
    if options.num_steps is not None and options.num_steps > most:
        rule = f"must be at most {most}, what blocks of {spec.block_size} tokens draft"
        raise ConfigError("--num-steps", rule, options.num_steps, "Leave it out.")
    return options.num_steps or most


def capture_layers_of(num_target_layers: int) -> tuple[int, ...]:
    """Return SGLang's default layers if they are three different ones, else up to three layers before the last.

    SGLang reads a layer's output where the next layer begins, so it never reads the output of the last layer.
    """
    layers = default_capture_layers(num_target_layers)
    if min(layers) >= 0 and len(set(layers)) == len(layers):
        return layers
    last = max(0, num_target_layers - 2)
    return tuple(sorted({0, (last + 1) // 2, last}))


def first_model(
    start: DraftCheckpoint | None,
    spec: DraftSpec,
    tensors: Mapping[str, torch.Tensor],
    target: ModelSpec,
    learned: Sequence[DraftSequence],
    frozen: FrozenTarget,
    draft_vocab_size: int | None,
    seed: int,
) -> DraftModel:
    """Return the draft of ``spec`` before its first update, on the device of ``frozen``.

    It learns to name the tokens that its head has rows of, or else those that the replies have most of.
    """
    if start is not None and start.hot_token_ids is not None:
        vocabulary = DraftVocabulary(start.hot_token_ids, target.vocab_size)
    else:
        size = spec.draft_vocab_size if spec.has_own_head else draft_vocab_size or DRAFT_VOCAB_SIZE
        vocabulary = DraftVocabulary.most_frequent(learned, target.vocab_size, size)
    if start is None:
        network = make_network(spec)
        warm_start(network, tensors, target, vocabulary, seed)
    else:
        network = load_network(spec, start.tensors)
    return DraftModel.of(network.to(frozen.device), frozen.embedding, frozen.head, vocabulary)


def draft_checksum(draft: DraftCheckpoint) -> str:
    """Return one digest of the draft's tensors and vocabulary."""
    ids = {} if draft.hot_token_ids is None else {"hot_token_ids": draft.hot_token_ids}
    return tensors_checksum({**draft.tensors, **ids})
