"""DraftSide trains the run's draft beside the policy, on what the policy's own passes have computed.

    stage 0    embedding, captured layers ─┐ sent after the passes
    ...        captured layers ────────────┤
    last stage final state, logits ────────┴─► every rank holds the draft, and learns from replies of its own

The copies make the same updates, of gradients summed over the stage's ranks; a draft's experts are spread over these.
Nothing that the policy is trained with is touched: neither its gradients nor a random number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from slime_spec.checkpoints.draft_choice import trainable_draft
from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import DraftCheckpoint, draft_shapes, load_draft, save_draft_checkpoint
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.draft_training import loss_for, rows_of_reply
from slime_spec.config.pipeline_stages import stage_layers
from slime_spec.config.tree import Config
from slime_spec.draft.ranks import expert_of, experts_of, holder_of
from slime_spec.draft.training.online import DraftSums, OnlineDraft, SeenReply, hot_token_ids
from slime_spec.draft.training.served import RULES
from slime_spec.draft.training.trainer import TrainSettings
from slime_spec.interfaces import WeightTransport
from slime_spec.types import DraftReport, TrainSample
from slime_spec.weights.messages import PushBucket
from slime_spec.weights.run import bucket_of, bucketed
from slime_spec.weights.served import ServedForm
from trainer_bridge.checkpoint_folder import publish_folder, tidy, unfinished_folder
from trainer_bridge.draft_rows import ReplyRows, choose_replies, reply_rows
from trainer_bridge.megatron.adam_state import OnHost
from trainer_bridge.megatron.draft_ranks import StageRanks
from trainer_bridge.megatron.model import PolicyModel, policy_device
from trainer_bridge.megatron.pass_capture import ARGMAX, EMBEDDING, FINAL, LOGSUMEXP, KeptRows, PassCapture, layer_name
from trainer_bridge.megatron.process_groups import is_first_of_stage
from trainer_bridge.packing import MicrobatchPlan

STATE_FILE = "draft.pt"


class DraftSide:
    """Holds the draft on the ranks that are ``is_owner``; every method is collective over all ranks."""

    def __init__(self, config: Config, target: ModelSpec, model: PolicyModel, temperature: float) -> None:
        chosen = trainable_draft(config, target)
        assert isinstance(chosen.spec, DraftSpec), "a whole model is not trained"
        self.config, self.spec, self._settings = config, chosen.spec, config.draft_training
        self._model, self._temperature = model, temperature
        # A block is computed in one pass, and learned from in all its positions.
        self._num_steps = self.spec.num_block_drafts or self._settings.num_steps
        self._num_layers = target.num_layers
        checkpoint = load_draft(chosen.folder, self.spec)
        self._form = ServedForm.of(config, self.spec.in_target)
        self._file_dtype = next(iter(checkpoint.tensors.values())).dtype
        self.token_ids = hot_token_ids(checkpoint)
        self._ranks = StageRanks()
        self.is_owner = bool(mpu.is_pipeline_last_stage())
        self.draft = self._online(checkpoint) if self.is_owner else None
        self._capture = PassCapture(model, self.spec.capture_layers, temperature)
        self._num_lessons = 0
        self._begin_step()

    def _online(self, checkpoint: DraftCheckpoint) -> OnlineDraft:
        settings = TrainSettings(
            num_steps=self._num_steps,
            batch_size=self._settings.batch_size,
            lr=self._settings.lr,
            clip_grad=self._settings.clip_grad,
            step_decay=self._settings.step_decay,
            loss=loss_for(self._settings, self.spec.family),
            loss_top_k=self._settings.loss_top_k,
            loss_scale=self._settings.loss_scale,
            position_weights=self._settings.position_weights,
            autocast=self._settings.dtype == "bfloat16",
        )
        return OnlineDraft(checkpoint, settings, self._temperature, policy_device(), self._ranks)

    def _begin_step(self) -> None:
        self._sums = DraftSums(torch.zeros(3, self._num_steps, dtype=torch.float64))
        self._grad_norms: list[float] = []
        self._num_skipped, self._seconds = 0, 0.0

    @contextmanager
    def learning(
        self, samples: Sequence[TrainSample], plans: Sequence[MicrobatchPlan], num_updates: int
    ) -> Iterator[None]:
        """Let the draft learn, behind the block, from the policy's passes over the plans' microbatches in the block.

        ``samples`` are the same on all ranks. The policy's weights are at the end of the block those of the passes.
        """
        settings = self._settings
        seed = f"{self.config.run.seed}/draft/{self._num_lessons}"
        self._num_lessons += 1
        max_rows = rows_of_reply(settings, self.spec.num_block_drafts)
        chosen = choose_replies(samples, num_updates * settings.batch_size, max_rows, seed)
        replies = [reply_rows(samples, plan, chosen, settings.max_length) for plan in plans]
        with self._capture.of(replies) as kept:
            yield
        start = perf_counter()
        if chosen:
            self._learn(kept, replies, num_updates)
        self._seconds += perf_counter() - start

    def report(self) -> DraftReport | None:
        """Return, on every rank, what the step's updates were, and begin another step; None where none were made."""
        parts = self._sums.packed().to(policy_device())
        if self.is_owner:
            self._ranks.add_up([parts])
        own = [sum(self._grad_norms), float(len(self._grad_norms)), float(self._num_skipped), self._seconds]
        values = torch.cat([parts, torch.tensor(own, dtype=parts.dtype, device=parts.device)])
        dist.broadcast(values, self._first_owner)
        self._begin_step()
        grad_norm, num_updates, num_skipped, seconds = values[-4:].tolist()
        sums = DraftSums.unpacked(values[:-4].cpu())
        if not num_updates + num_skipped:
            return None
        overlap, hits, num_rows = sums.by_position.tolist()
        rows, rounds = [max(1.0, each) for each in num_rows], sums.rounds.tolist()
        return DraftReport(
            loss=sums.loss / max(1.0, num_updates),
            grad_norm=grad_norm / num_updates if num_updates else None,
            acceptance=tuple(part / whole for part, whole in zip(overlap, rows, strict=True)),
            accuracy=tuple(part / whole for part, whole in zip(hits, rows, strict=True)),
            tokens_per_round={rule: sums.num_tokens / each for rule, each in zip(RULES, rounds, strict=True) if each},
            num_updates=int(num_updates),
            num_skipped=int(num_skipped),
            seconds=seconds,
        )

    @property
    def _first_owner(self) -> int:
        """Return the first rank of the last stage."""
        return (mpu.get_pipeline_model_parallel_world_size() - 1) * self._ranks.size

    def buckets(self, version: int, transport: WeightTransport, every_rank: bool) -> Iterator[PushBucket | None]:
        """Yield the draft's buckets on the last stage's first rank, or ``every_rank`` of it; None on its others.

        Collective over the ranks of the last stage; the other stages yield nothing.
        """
        if not self.is_owner:
            return
        publishes = every_rank or is_first_of_stage()
        weights = self._form.tensors(self._whole())
        for index, named in enumerate(bucketed(weights, self.config.push.bucket_bytes)):
            yield bucket_of(named, version, index, transport) if publishes else None

    def _whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the draft's weights by their names in its checkpoint, on every rank of the last stage, together."""
        assert self.draft is not None, "the last stage has the draft"
        own, experts = self.draft.tensors(), self.spec.block.experts
        for name, shape in draft_shapes(self.spec).items():
            expert = expert_of(name)
            if experts is None or expert is None or self._ranks.size == 1:
                yield name, own[name]
                continue
            tensor = own[name].contiguous() if name in own else torch.empty(shape, device=policy_device())
            holder = holder_of(expert, self._ranks.size, experts.num_experts)
            dist.broadcast(tensor, group_src=holder, group=self._ranks.group)
            yield name, tensor

    def gathered(self) -> dict[str, torch.Tensor]:
        """Return the draft's weights in host memory on the last stage's first rank, nothing elsewhere.

        Collective over the ranks of the last stage.
        """
        if not self.is_owner:
            return {}
        return {name: tensor.cpu() for name, tensor in self._whole() if self._writes}

    def parameters(self) -> Iterator[torch.Tensor]:
        return iter(()) if self.draft is None else self.draft.trainer.model.network.parameters()

    def moments(self) -> Iterator[torch.Tensor]:
        return iter(()) if self.draft is None else self.draft.trainer.moments()

    @property
    def _writes(self) -> bool:
        return self.is_owner and is_first_of_stage()

    def state(self, on_host: OnHost) -> dict[str, Any]:
        """Return on one rank, in host memory, what a checkpoint has; nothing elsewhere.

        Collective over the ranks of the last stage.
        """
        experts, is_spread = self.spec.block.experts, self.draft is not None and self.draft.is_spread
        if self.draft is None or not (self._writes or is_spread):
            return {}
        state: dict[str, Any] = _mapped(self.draft.state(), on_host)
        if is_spread and experts is not None:
            for part in ("network", "optimizer"):
                state[part] |= self._of_other_ranks(state[part], experts.num_experts)
        return {"lessons": self._num_lessons, **state} if self._writes else {}

    def _of_other_ranks(self, named: dict[str, Any], num_experts: int) -> dict[str, Any]:
        """Return on the rank that writes what all ranks' experts have, of each rank one expert at a time."""
        size = self._ranks.size
        found: dict[str, Any] = {}
        own = experts_of(self._ranks.rank, size, num_experts)
        for index in range(-(-num_experts // size)):
            expert = own[index] if index < len(own) else None
            part = {name: each for name, each in named.items() if expert is not None and expert_of(name) == expert}
            parts: list[Any] = [None] * size
            dist.gather_object(part, parts if self._writes else None, group_dst=0, group=self._ranks.group)
            for each in parts if self._writes else ():
                found |= each
        return found

    def load(self, folder: Path) -> bool:
        """Resume from a checkpoint's folder; False where it has no draft. Raises what torch does for another draft."""
        path = folder / STATE_FILE
        if not path.is_file():
            return False
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        self._num_lessons = state["lessons"]
        if self.draft is not None:
            self.draft.load_state(state)
        return True

    def export(self, folder: str, weights: dict[str, torch.Tensor]) -> None:
        """Write what was ``gathered`` as a checkpoint folder of its own, in place of an earlier one, on one rank."""
        if not weights:
            return
        target = Path(folder)
        tidy(target.parent, target.name)
        unfinished = unfinished_folder(target.parent, target.name)
        tensors = {name: tensor.to(self._file_dtype) for name, tensor in weights.items()}
        ids = self.token_ids if self.spec.has_own_head else None
        save_draft_checkpoint(unfinished, self.spec, tensors, ids)
        publish_folder(target.parent, target.name)

    def _learn(self, kept: Sequence[KeptRows | None], replies: Sequence[Sequence[ReplyRows]], num_updates: int) -> None:
        present = [(rows, of_mb) for rows, of_mb in zip(kept, replies, strict=True) if rows is not None]
        self._bring_to_last_stage([rows for rows, _ in present])
        mask = self._mask_embedding() if self.spec.block_size else None
        if not mpu.is_pipeline_last_stage():
            return
        head = self._head_rows()
        if self.draft is None:
            return
        seen: list[SeenReply] = []
        for rows, of_mb in present:
            seen += self._seen(rows, of_mb)
            rows.kept.clear()  # what is seen of the states are copies
        learned = self.draft.learn(seen, num_updates, head, mask)
        self._sums = DraftSums.unpacked(self._sums.packed() + learned.sums.packed())
        self._grad_norms += learned.grad_norms
        self._num_skipped += learned.num_skipped

    def _bring_to_last_stage(self, kept: Sequence[KeptRows]) -> None:
        """Send what earlier stages have kept to the last stage, whose ranks add it to their own."""
        num_stages = mpu.get_pipeline_model_parallel_world_size()
        if num_stages == 1 or not kept:
            return
        group = mpu.get_pipeline_model_parallel_group()
        members = dist.get_process_group_ranks(group)
        if not mpu.is_pipeline_last_stage():
            for name in self._names_of(mpu.get_pipeline_model_parallel_rank()):
                dist.send(torch.cat([rows.kept[name] for rows in kept]), members[-1], group=group)
            return
        sizes = [len(rows.fed) for rows in kept]
        like = kept[0].kept[FINAL]
        for stage in range(num_stages - 1):
            for name in self._names_of(stage):
                states = like.new_empty(sum(sizes), like.shape[1])
                dist.recv(states, members[stage], group=group)
                for rows, of_rows in zip(kept, states.split(sizes), strict=True):
                    rows.kept[name] = of_rows

    def _names_of(self, stage: int) -> list[str]:
        """Return what a stage before the last keeps, in the order in which it is sent."""
        own = stage_layers(self._num_layers, self.config.trainer)[stage]
        captured = [layer_name(layer) for layer in self.spec.capture_layers if layer in own]
        return [EMBEDDING, *captured] if stage == 0 else captured

    def _head_rows(self) -> torch.Tensor:
        """Return the head's rows of the draft's tokens, fp32 [draft vocab, hidden]; collective over tensor ranks."""
        model = self._model
        tied = model.share_embeddings_and_output_weights
        return _rows(model.shared_embedding_or_output_weight() if tied else model.output_layer.weight, self.token_ids)

    def _mask_embedding(self) -> torch.Tensor | None:
        """Return the policy's embedding of a block's masks, fp32 [1, hidden], on the ranks of the last stage.

        Collective over the ranks of a replica of the model; on other stages what is returned is of no use.
        """
        mask = None
        if self._model.pre_process:
            weight = self._model.embedding.word_embeddings.weight
            mask = _rows(weight, torch.tensor([self.spec.mask_token_id]))
        if mpu.get_pipeline_model_parallel_world_size() == 1:
            return mask
        group = mpu.get_pipeline_model_parallel_group()
        members = dist.get_process_group_ranks(group)
        if mask is not None:
            dist.send(mask, members[-1], group=group)
        elif mpu.is_pipeline_last_stage():
            mask = torch.empty(1, self.spec.target_hidden_size, device=policy_device())
            dist.recv(mask, members[0], group=group)
        return mask

    def _seen(self, rows: KeptRows, replies: Iterable[ReplyRows]) -> Iterator[SeenReply]:
        """Yield those replies of a microbatch that this tensor rank learns from, with what was kept of them."""
        num_ranks, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
        names = [layer_name(layer) for layer in self.spec.capture_layers] or [FINAL]
        features = torch.cat([rows.kept[name] for name in names], dim=-1)
        first = 0
        for reply, places in zip(replies, rows.places, strict=True):
            own = slice(first, first + len(reply.logits))
            first = own.stop
            if reply.slots[0] % num_ranks != rank:
                continue
            yield SeenReply(
                slots=reply.slots,
                token_ids=torch.tensor(reply.token_ids, device=places.device),
                embeddings=rows.kept[EMBEDDING][places],
                features=features[places],
                final=rows.kept[FINAL][places[-len(reply.logits) :]],
                argmax=rows.kept[ARGMAX][own],
                logsumexp=rows.kept[LOGSUMEXP][own],
            )


@torch.no_grad()
def _rows(weight: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return rows of a table whose vocabulary is split over tensor ranks, fp32; collective over these."""
    ids = token_ids.to(weight.device) - mpu.get_tensor_model_parallel_rank() * len(weight)
    if mpu.get_tensor_model_parallel_world_size() == 1:
        return weight[ids].float()
    is_own = (ids >= 0) & (ids < len(weight))
    rows = torch.where(is_own[:, None], weight[ids.clamp(0, len(weight) - 1)].float(), 0.0)
    dist.all_reduce(rows, group=mpu.get_tensor_model_parallel_group())
    return rows


def _mapped(value: Any, on_host: OnHost) -> Any:
    """Return a state with each tensor where its values are."""
    if isinstance(value, torch.Tensor):
        return on_host(value).cpu().clone()
    if isinstance(value, dict):
        return {key: _mapped(each, on_host) for key, each in value.items()}
    return [_mapped(each, on_host) for each in value] if isinstance(value, list | tuple) else value
