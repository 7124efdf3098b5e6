"""A draft learns beside slime's policy, from the passes of slime's own train steps, by slime's hook before each step.

    hook, step k      learn from the replies that step k - 1's passes have shown; keep the head's rows of now
    passes of step k  forward hooks keep, of some replies, what the draft reads and what it shall predict
    hook, step k + 1  ...

Nothing of the policy is touched: neither its gradients nor a random number. The draft is written as a folder, which
servers load; no push of slime's reaches it. What a rank lacks of the policy's states is refused, not guessed.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from slime_spec.checkpoints.draft_spec import DraftSpec, is_trainable
from slime_spec.checkpoints.draft_tensors import load_draft, save_draft_checkpoint
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.draft_training import DraftTrainingConfig, loss_for
from slime_spec.draft.training.online import OnlineDraft, SeenReply
from slime_spec.draft.training.trainer import TrainSettings
from slime_spec.errors import ConfigError
from slime_spec.integrations.settings import PluginSettings

logger = logging.getLogger(__name__)

SETTING = "slime_spec.learned_draft"
PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
ALONE = "Train the draft here with slime-spec train (docs/weights-and-drafts.md), or leave the setting out."
EMBEDDING, FINAL = "embedding", "final"


@dataclass(frozen=True)
class DataRanks:
    """Are the data-parallel ranks, each with a copy of the draft and replies of its own; implements DraftRanks."""

    rank: int
    size: int

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors if self.size > 1 else ():
            torch.distributed.all_reduce(tensor)

    def over_all_rows(self, x: torch.Tensor, compute: Any) -> torch.Tensor:
        return compute(x)  # a copy is whole: drafts with experts are refused


class DraftLearner:
    """Owns the draft on one rank; ``before_step`` is collective over the data-parallel ranks."""

    def __init__(self, args: Any, settings: PluginSettings, model: Sequence[Any]) -> None:
        assert settings.learned_draft is not None, "without a folder nothing learns"
        self._folder = Path(settings.learned_draft)
        self._model = _whole_model(args, model)
        self.spec = _spec(args, settings)
        checkpoint = load_draft(_draft_folder(args), self.spec)
        self._dtype = next(iter(checkpoint.tensors.values())).dtype
        self._hot_token_ids = checkpoint.hot_token_ids
        defaults = DraftTrainingConfig()
        self._max_rows, self._max_length = defaults.max_rows, defaults.max_length
        self._batch_size = defaults.batch_size
        self._random = random.Random(getattr(args, "rollout_seed", 0))
        device = next(self._model.parameters()).device
        temperature = float(getattr(args, "rollout_temperature", 1.0))
        self.draft = OnlineDraft(
            checkpoint,
            TrainSettings(
                num_steps=defaults.num_steps,
                batch_size=defaults.batch_size,
                lr=settings.draft_lr,
                clip_grad=defaults.clip_grad,
                step_decay=defaults.step_decay,
                loss=loss_for(defaults, self.spec.family),
                loss_top_k=defaults.loss_top_k,
                loss_scale=defaults.loss_scale,
                position_weights=defaults.position_weights,
                autocast=defaults.dtype == "bfloat16" and device.type == "cuda",
            ),
            temperature,
            device,
            _data_ranks(),
        )
        self._temperature = temperature
        self._head: torch.Tensor | None = None  # rows of the draft's tokens, of the weights of the step's passes
        self._states: dict[str, torch.Tensor] = {}
        self.replies: list[SeenReply] = []
        self.last_loss: float | None = None
        self._begin_hooks()

    def before_step(self) -> None:
        """Learn from the last step's replies; then see this step's."""
        if self._head is not None:
            learned = self.draft.learn(self.replies, 1, self._head)
            self.last_loss = learned.sums.loss
            logger.info(
                "draft learned replies=%d loss=%.4f skipped=%d",
                len(self.replies),
                learned.sums.loss,
                learned.num_skipped,
            )
        self.replies = []
        with torch.no_grad():
            self._head = self._head_weight()[self.draft.token_ids.to(self._head_weight().device)].float().clone()

    def publish(self, rollout_id: int) -> None:
        """Write the draft of a rollout as a folder, on the first rank."""
        if _data_ranks().rank:
            return
        folder = self._folder / f"rollout_{rollout_id}"
        tensors = {name: tensor.detach().to(self._dtype).cpu() for name, tensor in self.draft.tensors().items()}
        unfinished = self._folder / f".rollout_{rollout_id}"
        unfinished.mkdir(parents=True, exist_ok=True)
        save_draft_checkpoint(unfinished, self.spec, tensors, self._hot_token_ids)
        if folder.exists():  # of an earlier launch, which this one repeats
            shutil.rmtree(folder)
        unfinished.rename(folder)
        logger.info("draft published folder=%s", folder)

    def _head_weight(self) -> torch.Tensor:
        model = self._model
        tied = model.share_embeddings_and_output_weights
        weight: torch.Tensor = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
        return weight

    def _begin_hooks(self) -> None:
        model = self._model
        model.register_forward_pre_hook(lambda *_: self._states.clear())
        model.embedding.register_forward_hook(lambda _, __, out: self._keep(EMBEDDING, out))
        model.decoder.final_layernorm.register_forward_hook(lambda _, __, out: self._keep(FINAL, out))
        for layer in self.spec.capture_layers:
            module = model.decoder.layers[layer]
            module.register_forward_hook(lambda _, __, out, name=str(layer): self._keep(name, out))
        model.register_forward_hook(self._see, with_kwargs=True)

    def _keep(self, name: str, output: Any) -> None:
        """Keep states [tokens, 1, hidden] of a pass; where a layer is computed again, its first output counts."""
        states = output[0] if isinstance(output, tuple) else output
        if self._model.training and len(self.replies) < self._batch_size:
            self._states.setdefault(name, states.detach()[:, 0])

    def _see(self, module: Any, given: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """Make replies of a train pass that has ended; passes that only score have no gradient and show none."""
        if FINAL in self._states and self._head is not None and output.requires_grad:
            with torch.no_grad():
                self._make_replies(kwargs)
        self._states.clear()

    def _make_replies(self, kwargs: Mapping[str, Any]) -> None:
        ids, mask = kwargs["input_ids"][0], kwargs["loss_mask"][0]
        packed = kwargs["packed_seq_params"]
        bounds = [0, len(ids)] if packed is None else packed.cu_seqlens_q.tolist()
        names = [str(layer) for layer in self.spec.capture_layers] or [FINAL]
        features = torch.cat([self._states[name] for name in names], dim=-1)
        for start, stop in pairwise(bounds):
            if len(self.replies) < self._batch_size and (run := _run(mask[start:stop])) is not None:
                self.replies.append(self._reply(ids, features, start, start + run.start, start + run.stop))

    def _reply(self, ids: torch.Tensor, features: torch.Tensor, start: int, first: int, stop: int) -> SeenReply:
        """Make a reply whose prompt ends at row ``first``; rows up to ``stop`` predict tokens that count.

        A longer reply takes part with a window of its rows; what is before that is then its prompt.
        """
        num_rows = min(stop - first - 1, self._max_rows)
        first += self._random.randint(0, stop - first - 1 - num_rows)
        stop = first + 1 + num_rows
        start = max(start, stop - self._max_length)
        rows, behind = slice(start, stop), slice(first + 1, stop)
        final = self._states[FINAL][behind]
        logits = (final @ self._head_weight().T).float() / self._temperature
        return SeenReply(
            slots=(len(self.replies),),
            token_ids=ids[start : stop + 1].clone(),
            embeddings=self._states[EMBEDDING][rows].clone(),
            features=features[rows].clone(),
            final=final.clone(),
            argmax=logits.argmax(dim=-1),
            logsumexp=logits.logsumexp(dim=-1),
        )


def _run(mask: torch.Tensor) -> range | None:
    """Return the first run of rows that predict a token that counts, where it has two rows or more."""
    counts = mask.bool().tolist()
    first = next((row for row, each in enumerate(counts) if each), len(counts))
    stop = next((row for row in range(first, len(counts)) if not counts[row]), len(counts) - 1)
    return range(first, stop) if stop - first >= 2 else None


def _whole_model(args: Any, model: Sequence[Any]) -> Any:
    """Return the policy of this rank without its wrappers; raises ConfigError where the rank has a part of it."""
    for name in PARALLEL:
        if (size := getattr(args, name, 1) or 1) > 1:
            rule = f"needs the whole policy on each rank: slime's hook brings no states of other ranks ({name})"
            raise ConfigError(SETTING, rule, size, ALONE)
    if len(model) != 1:
        raise ConfigError(SETTING, "needs a policy in one part, not virtual pipeline stages", len(model), ALONE)
    policy = model[0]
    while not hasattr(policy, "decoder") and hasattr(policy, "module"):
        policy = policy.module
    lacking = [name for name in ("embedding", "decoder", "output_layer") if getattr(policy, name, None) is None]
    if lacking:
        rule = f"needs a policy with Megatron's parts, and this one has no {' and no '.join(lacking)}"
        raise ConfigError(SETTING, rule, type(policy).__name__, ALONE)
    return policy


def _draft_folder(args: Any) -> str:
    folder: str | None = getattr(args, "sglang_speculative_draft_model_path", None)
    if folder is None:
        remedy = "Pass --sglang-speculative-draft-model-path DIR; MTP layers learn by slime's --enable-mtp-training."
        raise ConfigError(SETTING, "needs a draft in a folder of its own", None, remedy)
    return folder


def _spec(args: Any, settings: PluginSettings) -> DraftSpec:
    folder = _draft_folder(args)
    spec = DraftSpec.from_folder(folder, ModelSpec.from_folder(args.hf_checkpoint))
    if not is_trainable(spec) or spec.block.experts is not None or spec.block_size:
        rule = "learns EAGLE-1 and EAGLE-3 drafts without experts; this draft is another"
        raise ConfigError(SETTING, rule, folder, ALONE)
    return spec


def _data_ranks() -> DataRanks:
    if not torch.distributed.is_initialized():
        return DataRanks(0, 1)
    return DataRanks(torch.distributed.get_rank(), torch.distributed.get_world_size())
