"""A TrainerRank holds the policy, its optimizer and the policy step. Ray appears only in the actor around the rank."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from megatron.core import parallel_state as mpu

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import load_tensors
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError, TrainingError
from slime_spec.interfaces import RunState, WeightTransport
from slime_spec.memory import release_freed_memory
from slime_spec.preflight.routing import check_routed, replayed_experts
from slime_spec.rl.advantages import with_advantages
from slime_spec.types import TisReport, TrainReport, TrainSample, is_greedy
from slime_spec.weights.messages import PushBucket, Side
from slime_spec.weights.run import bucket_of, bucketed
from slime_spec.weights.served import ServedForm
from trainer_bridge.flat_samples import SplitBatch, split_batch
from trainer_bridge.kl import estimated_kl
from trainer_bridge.layout import check_layout
from trainer_bridge.learning_rate import LearningRate
from trainer_bridge.loss_mean import LossMean
from trainer_bridge.megatron.adam_state import fill_masters
from trainer_bridge.megatron.checkpoint import TrainerState, load_checkpoint, save_checkpoint
from trainer_bridge.megatron.collective_write import agree
from trainer_bridge.megatron.cpu_shim import cpu_shim
from trainer_bridge.megatron.draft_side import DraftSide
from trainer_bridge.megatron.export import export_hf, write_export
from trainer_bridge.megatron.model import (
    build_model,
    exact_values,
    hf_names,
    hf_tensors,
    load_weights,
    policy_device,
)
from trainer_bridge.megatron.model_config import transformer_config
from trainer_bridge.megatron.optimizer import (
    build_optimizer,
    clip_gradients,
    gradient_buffers,
    optimizer_tensors,
    set_learning_rate,
    wrap_model,
)
from trainer_bridge.megatron.policy_step import TokenSums, accumulate_gradients, observe, with_reference_logprobs
from trainer_bridge.megatron.process_groups import is_first_of_stage, join_process_groups, leave_process_groups
from trainer_bridge.megatron.residency import Part, Residency, Tensors
from trainer_bridge.megatron.routing_replay import RoutingReplay
from trainer_bridge.megatron.scoring import response_logprobs
from trainer_bridge.microbatch import Microbatch, build_microbatch
from trainer_bridge.packing import MicrobatchPlan, plan_microbatches
from trainer_bridge.policy_loss import PolicyLoss

logger = logging.getLogger(__name__)


class TrainerRank:
    """Runs one trainer rank. Every method is collective: all ranks call it with the same arguments, in the same order.

    Example::

        rank = TrainerRank(config, rank=0, init_method="tcp://127.0.0.1:29500")
        rank.load()
        report = rank.step(samples)
    """

    def __init__(self, config: Config, rank: int, init_method: str) -> None:
        self.config = config
        self.spec = ModelSpec.from_folder(config.model.hf_checkpoint)
        layout = check_layout(config, self.spec)
        self.experts = replayed_experts(config, self.spec)
        self.loss, self.loss_mean = PolicyLoss(config.algorithm), LossMean.of(config)
        self.learning_rate = LearningRate.of(config)
        self.leaves_out_flat = not config.algorithm.moves_at_advantage_0
        temperature = config.rollout.temperature
        self.temperature = 1.0 if is_greedy(temperature) else temperature
        self.optimizer_step = 0
        self.form = ServedForm.of(config)
        torch.set_num_threads(config.trainer.num_cpus_per_rank)
        join_process_groups(layout, rank, init_method, config.run.seed)

    def load(self) -> RunState | None:
        """Build the model from the HF checkpoint; with trainer.load, resume and say where the run was."""
        trainer = self.config.trainer
        with cpu_shim():
            self.model = build_model(self.spec, transformer_config(self.spec, trainer))
            # Of hundreds of gigabytes a rank reads what it has a part of.
            own = hf_names(self.model, self.spec)
            tensors = load_tensors(self.config.model.hf_checkpoint, self.spec, names=own)
            load_weights(self.model, tensors, self.spec)
            self.reference = None
            if self.config.algorithm.needs_reference:
                self.reference = build_model(self.spec, transformer_config(self.spec, trainer)).requires_grad_(False)
                other = trainer.ref_load
                of_reference = tensors if other is None else load_tensors(other, self.spec, names=own)
                load_weights(self.reference, of_reference, self.spec)
                del of_reference
            # The policy's routers alone: the reference is another model, and routes by itself.
            self.replay = None if self.experts is None else RoutingReplay(self.model, self.experts)
            self.ddp = wrap_model(self.model, trainer)
            self.optimizer = build_optimizer(self.ddp, trainer)
            fill_masters(self.optimizer, exact_values(self.model, tensors, self.spec))
            del tensors
            self.draft = None
            if self.config.draft_training.enable:
                self.draft = DraftSide(self.config, self.spec, self.model, self.temperature)
            state = None
            if trainer.load is not None:
                state = load_checkpoint(trainer.load, self.model, self.optimizer, self.draft)
        self.residency = Residency(self.parts(), self._moving_device())
        self.residency.hold()
        if state is None:
            return None
        self.optimizer_step = state.optimizer_step
        logger.info("resumed path=%s rollout_id=%d", trainer.load, state.run.rollout_id)
        return state.run

    def step(self, samples: Sequence[TrainSample], learns_draft: bool = True) -> TrainReport:
        """Make one optimizer step per ``global_batch_size`` samples; the report is the same on every rank.

        Flat samples (see trainer_bridge.flat_samples) take no pass, and a step of nothing else is made all the same:
        Adam's moments and the weights decay, and the step counts for the warm-up.

        Raises TrainingError, on every rank, before a loss or gradient that is not finite reaches the weights.
        """
        self._check_lengths(samples)
        if self.experts is not None:
            check_routed(samples, self.experts, self.spec.num_layers)
        batch_size = self._samples_per_step(len(samples))
        sums = TokenSums()
        grad_norms: list[float] = []
        num_microbatches = 0
        with cpu_shim(), self.residency.stepping():
            samples, reward_kl = self._scored(samples, batch_size)
            for start in range(0, len(samples), batch_size):
                of_step = samples[start : start + batch_size]
                batch = split_batch(of_step, self.leaves_out_flat)
                if batch.flat and self.config.trainer.metrics_of_all_samples:
                    flat = self._with_reference(self._microbatches(batch.flat, self._plans(batch.flat)))
                    sums += observe(self.model, flat, self.loss, self.temperature)
                plans = self._plans(batch.trained)
                microbatches = self._counting(batch.flat, self._microbatches(batch.trained, plans))
                num_microbatches += len(microbatches)
                share = self._share(start // batch_size, -(-len(samples) // batch_size)) if learns_draft else 0
                with self._draft_learning(batch.trained, plans, share):
                    batch_sums = self._accumulate(microbatches)
                grad_norms.append(self._update(batch_sums.loss / self.loss_mean.size(of_step)))
                sums += batch_sums
            of_draft = None if self.draft is None else self.draft.report()
            of_routing = None if self.replay is None else self.replay.disagreement()
        if self.config.cluster.colocate:
            release_freed_memory()
        in_mean = self.loss_mean.size(samples)
        report = _report(sums, in_mean, split_batch(samples, self.leaves_out_flat), grad_norms, num_microbatches)
        if self.config.algorithm.use_tis and sums.num_tokens:
            report = replace(report, tis=_tis_report(sums))
        lr = self.learning_rate(self.optimizer_step - 1)
        return replace(report, draft=of_draft, routing_disagreement=of_routing, lr=lr, reward_kl=reward_kl)

    def push_buckets(
        self, version: int, transport: WeightTransport, every_rank: bool = False, side: Side = "target"
    ) -> Iterator[PushBucket | None]:
        """Yield this pipeline stage's weights of a side as the engines have them, numbered from 0 within the stage.

        Collective over the stage's holders; the first publishes, or ``every_rank``, and the others yield None.
        The parameters stay on the device until ``end_push``.
        """
        self.residency.hold(Part.PARAMETERS)
        if side == "draft":
            assert self.draft is not None, "a draft is pushed that is trained"
            yield from self.draft.buckets(version, transport, every_rank)
            return
        publishes = every_rank or is_first_of_stage()
        weights = self.form.tensors(hf_tensors(self.model, self.spec))
        for index, named in enumerate(bucketed(weights, self.config.push.bucket_bytes)):
            yield bucket_of(named, version, index, transport) if publishes else None

    def end_push(self) -> None:
        self.residency.hold()

    def save(self, folder: str, state: RunState) -> None:
        """Write ``folder/step-NNNNNN``; see trainer_bridge.megatron.checkpoint."""
        trainer_state = TrainerState(state, self.optimizer_step)
        with cpu_shim():
            save_checkpoint(folder, self.model, self.optimizer, trainer_state, self.residency.on_host, self.draft)

    def export_hf(self, folder: str, draft_folder: str | None = None) -> None:
        """Write the policy as a Hugging Face folder, with the tokenizer files of the checkpoint it came from.

        A draft that was trained goes to ``draft_folder``, in the format of SpecForge and SGLang, or where it is part of
        the policy's checkpoint, into that.
        """
        self.residency.hold(Part.PARAMETERS)
        draft = self.draft
        weights = {} if draft is None else draft.gathered()
        is_inside = draft is not None and draft.spec.in_target
        export_hf(self.model, self.spec, self.config.model.hf_checkpoint, folder, weights if is_inside else None)
        if draft is not None and draft_folder is not None and not is_inside:
            write_export(draft_folder, lambda: agree(lambda: draft.export(draft_folder, weights)))
        self.residency.hold()

    def close(self) -> None:
        leave_process_groups()

    def parts(self) -> Tensors:
        """Return the tensors of each part of this rank's memory, as they are when asked for."""
        reference = [] if self.reference is None else list(self.reference.parameters())
        draft = self.draft
        return {
            Part.PARAMETERS: lambda: chain(self.model.parameters(), draft.parameters() if draft else ()),
            Part.GRADIENTS: partial(gradient_buffers, self.ddp),
            Part.OPTIMIZER: lambda: chain(optimizer_tensors(self.optimizer), draft.moments() if draft else ()),
            Part.REFERENCE: lambda: reference,
        }

    def _moving_device(self) -> str | None:
        """Return the device that the trainer leaves to the engines; CPU memory is left where it is."""
        return "cuda" if self.config.trainer_leaves and policy_device().type == "cuda" else None

    def _accumulate(self, microbatches: Sequence[Microbatch]) -> TokenSums:
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        return accumulate_gradients(self.ddp, self._with_reference(microbatches), self.loss, self.temperature)

    def _with_reference(self, microbatches: Sequence[Microbatch]) -> Sequence[Microbatch]:
        if self.reference is None or not self.config.algorithm.measures_kl:
            return microbatches
        return with_reference_logprobs(self.reference, microbatches, self.temperature)

    def _samples_per_step(self, num_samples: int) -> int:
        trainer = self.config.trainer
        is_split = trainer.global_batch_size is not None or trainer.num_steps_per_rollout is not None
        return self.config.samples_per_step if is_split else num_samples

    def _scored(self, samples: Sequence[TrainSample], batch_size: int) -> tuple[Sequence[TrainSample], float | None]:
        """Return the samples with what must be known of all before the first update, and the mean KL in rewards.

        That is the KL to the reference where it lowers rewards, and the trainer's own logprobs where an update of the
        rollout comes before another that needs them.
        """
        algorithm, mean_kl = self.config.algorithm, None
        if algorithm.kl_coef > 0.0:
            assert self.reference is not None, "a KL needs a reference"
            kind = algorithm.kl_loss_type or "k1"
            kl = [
                tuple(estimated_kl(torch.tensor(sample.rollout_logprobs), torch.tensor(ref), kind).tolist())
                for sample, ref in zip(samples, self._logprobs_of(self.reference, samples), strict=True)
            ]
            samples = with_advantages(samples, algorithm, kl)
            counted = [
                each
                for sample, of_sample in zip(samples, kl, strict=True)
                for each, counts in zip(of_sample, sample.loss_mask or (1,) * len(of_sample), strict=True)
                if counts
            ]
            mean_kl = math.fsum(counted) / len(counted)
        if algorithm.use_tis and len(samples) > batch_size:
            own = self._logprobs_of(self.model, samples)
            samples = [replace(sample, trainer_logprobs=each) for sample, each in zip(samples, own, strict=True)]
        return samples, mean_kl

    def _logprobs_of(self, model: torch.nn.Module, samples: Sequence[TrainSample]) -> list[tuple[float, ...]]:
        plans = self._plans(samples)
        return response_logprobs(model, samples, plans, self._microbatches(samples, plans), self.temperature)

    def _update(self, loss: float) -> float:
        """Clip and step; returns the gradient norm before clipping."""
        set_learning_rate(self.optimizer, self.learning_rate(self.optimizer_step))
        grad_norm = clip_gradients(self.optimizer)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingError(
                f"optimizer step {self.optimizer_step} has loss {loss} and gradient norm {grad_norm}; "
                "it was not taken, and the weights are those of the step before"
            )
        self.optimizer.step_with_ready_grads()
        self.optimizer_step += 1
        return grad_norm

    def _share(self, batch: int, num_batches: int) -> int:
        """Return how many of the draft's optimizer steps follow a batch, one of those that make up the rollout."""
        total = self.config.draft_training.num_optimizer_steps
        return (batch + 1) * total // num_batches - batch * total // num_batches

    def _draft_learning(
        self, samples: Sequence[TrainSample], plans: Sequence[MicrobatchPlan], num_updates: int
    ) -> AbstractContextManager[None]:
        """Have the draft learn, in so many optimizer steps, from the passes that the block makes."""
        if self.draft is None or num_updates == 0:
            return nullcontext()
        return self.draft.learning(samples, plans, num_updates)

    def _plans(self, samples: Sequence[TrainSample]) -> list[MicrobatchPlan]:
        """Return this data parallel rank's microbatches of the samples."""
        plans = plan_microbatches(
            samples,
            max_tokens=self.config.trainer.max_tokens_per_microbatch,
            num_ranks=mpu.get_data_parallel_world_size(),
        )
        return plans[mpu.get_data_parallel_rank()]

    def _microbatches(self, samples: Sequence[TrainSample], plans: Sequence[MicrobatchPlan]) -> list[Microbatch]:
        model_config = self.model.config
        # Sequence-parallel ranks have as many rows each.
        multiple = model_config.tensor_model_parallel_size if model_config.sequence_parallel else 1
        return [build_microbatch(samples, plan, policy_device(), multiple, self.loss_mean) for plan in plans]

    def _counting(self, flat: Sequence[TrainSample], microbatches: list[Microbatch]) -> list[Microbatch]:
        """Let flat samples count in the mean: once, by the first microbatch of the first data parallel rank."""
        if mpu.get_data_parallel_rank():
            return microbatches
        first, *others = microbatches
        return [replace(first, num_in_mean=first.num_in_mean + self.loss_mean.size(flat)), *others]

    def _check_lengths(self, samples: Sequence[TrainSample]) -> None:
        longest = max(len(sample.token_ids) for sample in samples)
        if longest > self.spec.max_position_embeddings:
            raise ConfigError(
                "train sample",
                f"must fit the model's context of {self.spec.max_position_embeddings} tokens",
                longest,
                "Lower --rollout-max-prompt-len or --rollout-max-response-len.",
            )


def _report(
    sums: TokenSums, in_mean: int, batch: SplitBatch, grad_norms: Sequence[float], num_microbatches: int
) -> TrainReport:
    """Divide the sums: the loss's by its mean's size, what only a pass can tell by the tokens that had one."""
    had_pass = sums.num_tokens > 0
    return TrainReport(
        loss=sums.loss / in_mean,
        pg_loss=sums.pg_loss / in_mean,
        grad_norm=sum(grad_norms) / len(grad_norms),
        entropy=sums.entropy / sums.num_tokens if had_pass else None,
        clip_fraction=sums.clipped / batch.num_tokens,
        kl=sums.kl / sums.num_tokens if had_pass else 0.0,
        train_rollout_logprob_abs_diff=sums.logprob_abs_diff / sums.num_tokens if had_pass else None,
        num_tokens=batch.num_tokens,
        num_trained_tokens=batch.num_trained_tokens,
        num_optimizer_steps=len(grad_norms),
        num_microbatches=num_microbatches,
    )


def _tis_report(sums: TokenSums) -> TisReport:
    return TisReport(sums.tis / sums.num_tokens, sums.tis_bounded / sums.num_tokens, sums.tis_abs / sums.num_tokens)
