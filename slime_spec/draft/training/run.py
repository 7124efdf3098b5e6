"""Train a draft to the end or a deadline, and save the state in a folder, so that a kill loses only minutes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from slime_spec.draft.training.batch import TrainBatch, collate, epoch_batches
from slime_spec.draft.training.feature_store import FeatureStore
from slime_spec.draft.training.held_out import Tally, judge
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.training.progress import Progress
from slime_spec.draft.training.sequence import DraftSequence
from slime_spec.draft.training.trainer import DraftTrainer, StepReport, TrainSettings
from slime_spec.errors import ConfigError

STATE_FILE = "training.pt"
# Weight of the newest update in the loss and acceptance that are shown.
SMOOTHING = 0.05


@dataclass(frozen=True)
class Limits:
    """Holds the limits of a training: ``deadline_s`` is on ``clock``; a state is saved every ``save_every_s``."""

    clock: Callable[[], float]
    deadline_s: float = float("inf")
    save_every_s: float = 120.0


def train_draft(
    model: DraftModel,
    settings: TrainSettings,
    sequences: Sequence[DraftSequence],
    store: FeatureStore,
    folder: Path,
    limits: Limits,
    progress: Progress,
) -> DraftTrainer:
    """Train ``model`` on the sequences, from ``folder``'s state where it has one, and leave the state there.

    Stops early at the deadline. The result does not depend on interruptions.
    """
    device = model.embedding.device
    per_epoch = -(-len(sequences) // settings.batch_size)
    num_updates = settings.epochs * per_epoch
    trainer = DraftTrainer(model, settings, num_updates)
    load_state(trainer, folder)
    shown: StepReport | None = None
    saved_at = limits.clock()
    while trainer.step_number < num_updates and limits.clock() < limits.deadline_s:
        epoch, first = divmod(trainer.step_number, per_epoch)
        for batch in epoch_batches(sequences, settings.batch_size, settings.seed, epoch)[first:]:
            report = trainer.step(collate(batch, store, device))
            shown = report if shown is None else _smoothed(shown, report)
            note = f"loss {shown.loss:.3f} · accept {shown.acceptance:.3f} · lr {shown.lr:.1e}"
            progress.show("training", trainer.step_number, num_updates, note)
            if limits.clock() >= limits.deadline_s:
                break
            if limits.clock() - saved_at >= limits.save_every_s:
                save_state(trainer, folder)
                saved_at = limits.clock()
    save_state(trainer, folder)
    return trainer


def judge_draft(
    model: DraftModel,
    sequences: Sequence[DraftSequence],
    store: FeatureStore,
    batch_size: int,
    num_positions: int,
    progress: Progress,
) -> dict[str, Tally]:
    """Return held-out acceptance per kind of reply."""
    batches = epoch_batches(sequences, batch_size, 0, 0)
    device = model.embedding.device

    def loaders() -> Any:
        for number, batch in enumerate(batches):
            progress.show("judging", number, len(batches))

            def load(batch: Sequence[DraftSequence] = batch) -> TrainBatch:
                return collate(batch, store, device)

            yield [sequence.kind for sequence in batch], load

    return judge(model, loaders(), num_positions)


def save_state(trainer: DraftTrainer, folder: Path) -> None:
    """Write the training's state whole or not at all."""
    scratch = folder / f"{STATE_FILE}.partial"
    torch.save({"settings": asdict(trainer.settings), **trainer.state()}, scratch)
    os.replace(scratch, folder / STATE_FILE)


def load_state(trainer: DraftTrainer, folder: Path) -> None:
    """Resume from the folder's state, if there is a state; raises ConfigError if its settings differ."""
    path = folder / STATE_FILE
    if not path.is_file():
        return
    state = torch.load(path, map_location=trainer.model.embedding.device, weights_only=True)
    now = {**asdict(trainer.settings), "num_updates": trainer.num_updates}
    # A training that began before a setting existed did what its default does.
    started = {**asdict(TrainSettings()), **state["settings"], "num_updates": state["num_updates"]}
    if changed := [name for name in now if now[name] != started.get(name)]:
        name = changed[0]
        raise ConfigError(
            f"--{name.replace('_', '-')}",
            f"must be what the training was started with ({started.get(name)}): a resumed one repeats nothing",
            now[name],
            "Pass the same settings, or another --out.",
        )
    trainer.load_state(state)


def _smoothed(old: StepReport, new: StepReport) -> StepReport:
    def mean(a: float, b: float) -> float:
        return (1 - SMOOTHING) * a + SMOOTHING * b

    return StepReport(
        loss=mean(old.loss, new.loss),
        acceptance=mean(old.acceptance, new.acceptance),
        accuracy=mean(old.accuracy, new.accuracy),
        grad_norm=mean(old.grad_norm, new.grad_norm),
        lr=new.lr,
    )
