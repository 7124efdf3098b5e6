"""The trainer makes optimizer steps: EAGLE-3's unrolled loss, AdamW in fp32, warm-up and cosine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from slime_spec.config.draft_training import D_PACE, REPLY_LOSS, TOP_K
from slime_spec.draft.ranks import ONE_RANK, DraftRanks, expert_of
from slime_spec.draft.training.batch import TrainBatch
from slime_spec.draft.training.loss import loss_of
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.training.unrolled import Objective, Unrolled, unrolled_loss
from slime_spec.errors import TrainingError


@dataclass(frozen=True)
class TrainSettings:
    """Holds SpecForge's recipe with a larger ``lr`` and a smaller ``num_steps``, for a small head and short drafts.

    ``batch_size`` counts sequences. ``autocast`` computes the network in bfloat16 (weights and moments stay fp32).
    """

    num_steps: int = 5
    epochs: int = 8
    batch_size: int = 8
    lr: float = 1e-3
    warmup_ratio: float = 0.015
    clip_grad: float = 0.5
    step_decay: float = 0.8
    loss: str = "soft_ce"
    seed: int = 0
    autocast: bool = False
    loss_top_k: int = TOP_K
    position_weights: str = "decay"
    loss_scale: float = 1.0

    @property
    def objective(self) -> Objective:
        return Objective(
            loss_of(self.loss, self.loss_top_k),
            self.num_steps,
            self.step_decay,
            learns_replies=self.loss == REPLY_LOSS,
            paces=self.position_weights == D_PACE,
        )


@dataclass(frozen=True)
class StepReport:
    """Reports a step: ``acceptance`` is Σ min(p, q) of draft step 0, ``accuracy`` the share of right argmaxes."""

    loss: float
    acceptance: float
    accuracy: float
    grad_norm: float
    lr: float


@dataclass(frozen=True)
class Update:
    """Reports an update: what the draft was before it, the norm of its gradient before clipping, the learning rate."""

    unrolled: Unrolled | None
    grad_norm: float
    lr: float


class DraftTrainer:
    """Owns a draft's parameters and their moments. Example::

        trainer = DraftTrainer(model, settings, num_updates=1000)
        report = trainer.step(batch)
        torch.save(trainer.state(), path)

    ``num_updates`` is where the learning rate ends; None is a training without an end, at a constant rate.
    ``ranks`` have other parts of a batch each.
    """

    def __init__(
        self,
        model: DraftModel,
        settings: TrainSettings,
        num_updates: int | None,
        ranks: DraftRanks = ONE_RANK,
    ) -> None:
        self.model, self.settings, self.num_updates, self.step_number = model, settings, num_updates, 0
        self._ranks = ranks
        # The draft's own embedding, if there is one, is a copy of the target's and is not trained.
        for name, parameter in model.network.named_parameters():
            parameter.requires_grad_("embed_tokens" not in name)
        self._named = {name: each for name, each in model.network.named_parameters() if each.requires_grad}
        self._parameters = list(self._named.values())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, batch: TrainBatch) -> StepReport:
        """Make one update; raises TrainingError and keeps the weights where the gradient is not finite."""
        update = self.update(batch)
        assert update.unrolled is not None, "there was a batch"
        loss, quality = float(update.unrolled.loss.detach()), update.unrolled.quality
        first = quality.valid[..., 0].sum().clamp_min(1)
        overlap, hits = quality.overlap[..., 0].sum() / first, quality.hits[..., 0].sum() / first
        return StepReport(loss, float(overlap), float(hits), update.grad_norm, update.lr)

    def update(self, batch: TrainBatch | None, num_rows: torch.Tensor | None = None) -> Update:
        """Make one update, of which this rank has ``batch``, or nothing; ``num_rows`` are those of all ranks."""
        lr = learning_rate(self.step_number, self.num_updates, self.settings)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad(set_to_none=True)
        unrolled = None
        if batch is not None:
            with torch.autocast(batch.token_ids.device.type, torch.bfloat16, enabled=self.settings.autocast):
                unrolled = unrolled_loss(self.model, batch, self.settings.objective, num_rows)
            (self.settings.loss_scale * unrolled.loss).backward()
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grad_norm = self._summed_and_clipped()
        if not math.isfinite(grad_norm):
            raise TrainingError(f"the draft's gradient is not finite at update {self.step_number}: lower its lr")
        self._optimizer.step()
        self.step_number += 1
        return Update(unrolled, grad_norm, lr)

    def _summed_and_clipped(self) -> float:
        """Add up the ranks' gradients and clip them; returns their norm before, the same on every rank.

        An expert's gradients are whole where the expert is.
        """
        of_all: list[torch.Tensor] = []
        of_own: list[torch.Tensor] = []
        for name, parameter in self._named.items():
            is_own = self.model.network.is_spread and expert_of(name) is not None
            assert parameter.grad is not None, "update gives every parameter a gradient"
            (of_own if is_own else of_all).append(parameter.grad)
        self._ranks.add_up(of_all)
        norm = torch.nn.utils.get_total_norm(of_all)
        if self.model.network.is_spread:
            square = torch.nn.utils.get_total_norm(of_own).to(norm.device) ** 2
            self._ranks.add_up([square])
            norm = (norm**2 + square).sqrt()
        torch.nn.utils.clip_grads_with_norm_(self._parameters, self.settings.clip_grad, norm)
        return float(norm)

    def drop_gradients(self) -> None:
        """Free the gradients' memory until the next update."""
        self._optimizer.zero_grad(set_to_none=True)

    def moments(self) -> Iterator[torch.Tensor]:
        """Yield AdamW's moments so far."""
        for state in self._optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.dim())

    def state(self) -> dict[str, Any]:
        """Return the state from which ``load_state`` resumes, bit for bit."""
        return {
            "step_number": self.step_number,
            "num_updates": self.num_updates,
            "network": self.model.network.state_dict(),
            "optimizer": {name: self._optimizer.state[each] for name, each in self._named.items() if self.step_number},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state, of which a rank with some experts leaves the others' aside."""
        self.step_number = state["step_number"]
        own = self.model.network.state_dict()
        network = {name: each for name, each in state["network"].items() if name in own or expert_of(name) is None}
        self.model.network.load_state_dict(network)
        stored = state["optimizer"]
        if "param_groups" in stored:  # as earlier versions wrote it, in the order of the parameters
            stored = dict(zip(self._named, stored["state"].values(), strict=False))
        moments = {index: stored[name] for index, name in enumerate(self._named) if stored}
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})


def learning_rate(step: int, num_updates: int | None, settings: TrainSettings) -> float:
    """Return the rate: linear warm-up over ``warmup_ratio`` of the updates, then a cosine to zero; constant without."""
    if num_updates is None:
        return settings.lr
    warmup = max(1, round(settings.warmup_ratio * num_updates))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_updates - warmup)))
