"""``slime-spec draft eval`` judges a draft's acceptance by position, on replies of its target."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.columns import columns
from slime_spec.draft.training.feature_store import FeatureStore
from slime_spec.draft.training.held_out import Tally
from slime_spec.draft.training.run import judge_draft
from slime_spec.draft.training.sequence import DraftSequence
from slime_spec.draft.training.target import FrozenTarget
from slime_spec.errors import ConfigError
from slime_spec.launch.draft.console import ConsoleProgress, held_out_table
from slime_spec.launch.draft.corpus import generate_corpus, imported_corpus, plan_corpus
from slime_spec.launch.draft.corpus_settings import CORPUS_FILE
from slime_spec.launch.draft.eval_options import EvalOptions
from slime_spec.launch.draft.start import first_model, load_start
from slime_spec.launch.draft.train import NUM_POSITIONS, check_device


def evaluate(options: EvalOptions) -> int:
    """Run the command; its table goes to the terminal, and its numbers to ``options.json``."""
    console = Console(stderr=True, width=columns())
    target = ModelSpec.from_folder(options.target)
    check_device(options.device)
    with TemporaryDirectory(prefix="slime-spec-draft-") as name, ConsoleProgress(console) as progress:
        tallies = _tallies(options, target, Path(name), progress)
    if options.json is not None:
        report = {kind: tally.summary() for kind, tally in sorted(tallies.items())}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    console.print(held_out_table(tallies, f"acceptance of {options.draft}"))
    return 0


def _tallies(options: EvalOptions, target: ModelSpec, scratch: Path, progress: ConsoleProgress) -> dict[str, Tally]:
    start = load_start(options, target)
    assert start is not None, "the command needs a draft"
    num_positions = _num_positions(options.num_positions, start.spec.num_block_drafts)
    imported = imported_corpus(options.target, options.corpus)
    planned = [] if imported is not None else plan_corpus(options.target, options.corpus)
    sequences = imported
    if sequences is None:
        corpus = scratch / CORPUS_FILE
        sequences = generate_corpus(options.target, options.dtype, options.device, planned, corpus, progress)
    sequences = _judgeable(sequences)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    frozen = FrozenTarget(options.target, target, start.spec.capture_layers, dtype, device)
    store = FeatureStore(scratch / "features", frozen, "", sequences)
    store.compute(progress)
    model = first_model(start, start.spec, {}, target, sequences, frozen, None, 0).over_all_tokens(frozen.head)
    return judge_draft(model, sequences, store, options.batch_size, num_positions, progress)


def _num_positions(asked: int | None, num_block_drafts: int) -> int:
    """Return how many drafts of a round are judged; raises ConfigError for more than a block has."""
    if num_block_drafts and (asked or 0) > num_block_drafts:
        rule = f"must be at most {num_block_drafts}, what a block of this draft has"
        raise ConfigError("--num-positions", rule, asked, "Leave it out.")
    return asked or num_block_drafts or NUM_POSITIONS


def _judgeable(sequences: list[DraftSequence]) -> list[DraftSequence]:
    """Leave out replies of one token, in which no draft is verified."""
    kept = [each for each in sequences if len(each.reply) >= 2]
    if not kept:
        rule = "must give a reply of at least two tokens"
        raise ConfigError("--num-prompts", rule, len(sequences), "Pass more, or other prompts.")
    return kept
