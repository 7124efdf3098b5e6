"""``slime-spec draft train`` makes corpus, features, training, held-out acceptance, checkpoint, provenance."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from time import monotonic

import torch
from rich.console import Console

from slime_spec.algorithms import algorithm_of_family
from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import load_draft, save_draft_checkpoint
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import load_tensors
from slime_spec.columns import columns
from slime_spec.draft.build import network_tensors
from slime_spec.draft.training.feature_store import FeatureStore
from slime_spec.draft.training.held_out import Tally
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.training.progress import Progress
from slime_spec.draft.training.run import Limits, judge_draft, train_draft
from slime_spec.draft.training.sequence import DraftSequence, as_line, is_held_out, split
from slime_spec.draft.training.target import FrozenTarget
from slime_spec.draft.training.trainer import DraftTrainer, TrainSettings
from slime_spec.errors import ConfigError
from slime_spec.files import write_whole
from slime_spec.launch.draft.console import ConsoleProgress, held_out_table
from slime_spec.launch.draft.corpus import PlannedReply, generate_corpus, imported_corpus, plan_corpus
from slime_spec.launch.draft.corpus_settings import CORPUS_FILE
from slime_spec.launch.draft.options import DraftOptions
from slime_spec.launch.draft.provenance import DraftStart, tensors_checksum, write_provenance
from slime_spec.launch.draft.start import draft_checksum, draft_spec, first_model, load_start, num_steps_of
from slime_spec.launch.draft.started import check_started

# The number of judged positions: the chain that engines draft by default.
NUM_POSITIONS = 3
HELD_OUT_FILE = "held_out.json"


def train(options: DraftOptions, command: Sequence[str]) -> int:
    """Run the command; its tables go to the terminal, everything else to ``options.out``."""
    console = Console(stderr=True, width=columns())
    target = ModelSpec.from_folder(options.target)
    start = load_start(options, target)
    spec = draft_spec(options, target) if start is None else start.spec
    num_steps = num_steps_of(options, spec)
    check_device(options.device)
    imported = imported_corpus(options.target, options.corpus)
    planned = plan_corpus(options.target, options.corpus) if imported is None else []
    prompts = {each.prompt_token_ids for each in planned} | {each.prompt for each in imported or ()}
    _check_split(prompts, options)
    tensors = load_tensors(options.target, target)
    checksum = tensors_checksum(tensors)
    begun = None if start is None else DraftStart(str(options.draft), draft_checksum(start))
    check_started(options, num_steps, checksum, None if begun is None else begun.checksum)
    with ConsoleProgress(console) as progress:
        sequences = _corpus(options, planned, imported, progress)
        learned, held_out = split(sequences, options.held_out_percent)
        frozen, store = _features(options, spec, target, checksum, [*learned, *held_out], progress)
        model = first_model(start, spec, tensors, target, learned, frozen, options.draft_vocab_size, options.seed)
        trainer = _trained(options, num_steps, model, learned, store, progress)
        tallies = _judged(options, trainer, frozen, held_out, store, progress)
    report = {kind: tally.summary() for kind, tally in sorted(tallies.items())}
    _write_checkpoint(options, model)
    load_draft(options.out, DraftSpec.from_folder(options.out, target))  # engines must load what was written
    for path in filter(None, (options.out / HELD_OUT_FILE, options.json)):
        path.write_text(json.dumps(report, indent=2) + "\n")
    write_provenance(options, command, checksum, begun, (learned, held_out), trainer, report)
    console.print(held_out_table(tallies))
    console.print(_closing(options, trainer), soft_wrap=True, markup=False, highlight=False)
    return 0


def check_device(device: str) -> None:
    """Raise ConfigError for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", "cuda needs a GPU that torch can use", device, "Pass --device cpu.")


def _check_split(prompts: Collection[tuple[int, ...]], options: DraftOptions) -> None:
    if {is_held_out(each, options.held_out_percent) for each in prompts} != {True, False}:
        raise ConfigError(
            "--num-prompts" if options.corpus.conversations is None else "--conversations",
            f"must give prompts to learn from and, of {options.held_out_percent} percent, prompts to judge by",
            len(prompts),
            "Pass more prompts, or another --held-out-percent.",
        )


def _corpus(
    options: DraftOptions,
    planned: Sequence[PlannedReply],
    imported: list[DraftSequence] | None,
    progress: Progress,
) -> list[DraftSequence]:
    """Return the corpus, which OUT keeps as a file."""
    path = options.out / CORPUS_FILE
    if imported is None:
        return generate_corpus(options.target, options.dtype, options.device, planned, path, progress)
    write_whole(path, "".join(f"{as_line(each)}\n" for each in imported))
    return imported


def _features(
    options: DraftOptions,
    spec: DraftSpec,
    target: ModelSpec,
    checksum: str,
    sequences: Sequence[DraftSequence],
    progress: Progress,
) -> tuple[FrozenTarget, FeatureStore]:
    """Compute the target's features of every sequence, in OUT/features; keep only the target's shared tensors."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    frozen = FrozenTarget(options.target, target, spec.capture_layers, dtype, device)
    identity = f"{checksum} {spec.capture_layers} {options.dtype}"
    store = FeatureStore(options.out / "features", frozen, identity, sorted(sequences, key=lambda each: each.index))
    store.compute(progress)
    return frozen, store


def _trained(
    options: DraftOptions,
    num_steps: int,
    model: DraftModel,
    learned: Sequence[DraftSequence],
    store: FeatureStore,
    progress: Progress,
) -> DraftTrainer:
    settings = TrainSettings(
        num_steps=num_steps,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        loss=options.loss,
        loss_top_k=options.loss_top_k,
        step_decay=options.step_decay,
        position_weights=options.position_weights,
        seed=options.seed,
        autocast=options.autocast,
    )
    deadline_s = float("inf") if options.minutes is None else monotonic() + 60 * options.minutes
    return train_draft(model, settings, learned, store, options.out, Limits(monotonic, deadline_s), progress)


def _judged(
    options: DraftOptions,
    trainer: DraftTrainer,
    frozen: FrozenTarget,
    held_out: Sequence[DraftSequence],
    store: FeatureStore,
    progress: Progress,
) -> dict[str, Tally]:
    num_positions = trainer.model.network.spec.num_block_drafts or NUM_POSITIONS
    served = trainer.model.over_all_tokens(frozen.head)
    # Without a draft vocabulary logits are wide: smaller batches bound the memory.
    batch_size = options.batch_size if served is trainer.model else max(1, options.batch_size // 4)
    return judge_draft(served, held_out, store, batch_size, num_positions, progress)


def _write_checkpoint(options: DraftOptions, model: DraftModel) -> None:
    dtype = getattr(torch, options.draft_dtype)
    tensors = {name: tensor.to(dtype) for name, tensor in network_tensors(model.network).items()}
    ids = model.vocabulary.target_ids if model.network.own_head is not None else None
    save_draft_checkpoint(options.out, model.network.spec, tensors, ids)


def _closing(options: DraftOptions, trainer: DraftTrainer) -> str:
    state = f"wrote {options.out} after {trainer.step_number} of {trainer.num_updates} updates"
    algorithm = algorithm_of_family(trainer.model.network.spec.family).name
    use = f"--sglang-speculative-algorithm {algorithm} --sglang-speculative-draft-model-path {options.out}"
    more = "" if trainer.step_number == trainer.num_updates else "; --resume goes on"
    return f"{state}{more}\nuse it with: {use}"
