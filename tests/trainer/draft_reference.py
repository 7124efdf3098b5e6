"""A draft that learns on features of transformers' own passes, for one that learns beside a policy to be held to."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import load_draft
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.draft_training import loss_for, rows_of_reply
from slime_spec.config.tree import Config
from slime_spec.draft.build import load_network, network_tensors
from slime_spec.draft.training.batch import TrainBatch, padded
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.training.online import hot_token_ids
from slime_spec.draft.training.sequence import DraftSequence
from slime_spec.draft.training.target import FrozenTarget
from slime_spec.draft.training.trainer import DraftTrainer, TrainSettings
from slime_spec.draft.training.vocabulary import DraftVocabulary
from slime_spec.types import TrainSample
from trainer_bridge.draft_rows import choose_replies


def reference(
    config: Config, samples: Sequence[TrainSample], temperature: float = 1.0, passes_of: Path | None = None
) -> dict[str, torch.Tensor]:
    """The draft after one step of the policy, as reference_trainer trains it."""
    return network_tensors(reference_trainer(config, samples, temperature, passes_of).model.network)


def reference_trainer(
    config: Config, samples: Sequence[TrainSample], temperature: float = 1.0, passes_of: Path | None = None
) -> DraftTrainer:
    """Train the draft for a step as ``slime-spec draft train`` does, on features of transformers' own passes."""
    folder = passes_of or Path(config.model.hf_checkpoint)
    target_spec = ModelSpec.from_folder(config.model.hf_checkpoint)
    draft_folder = Path(config.speculative.draft_model_path or config.model.hf_checkpoint)
    spec = DraftSpec.from_folder(draft_folder, target_spec)
    target = FrozenTarget(folder, target_spec, spec.capture_layers, torch.float32, torch.device("cpu"))
    checkpoint = load_draft(draft_folder, spec)
    vocabulary = DraftVocabulary(hot_token_ids(checkpoint), target_spec.vocab_size)
    model = DraftModel.of(load_network(spec, checkpoint.tensors), target.embedding, target.head, vocabulary)
    wanted = config.draft_training
    loss = loss_for(wanted, spec.family)
    settings = TrainSettings(num_steps=wanted.num_steps, lr=wanted.lr, loss=loss, clip_grad=wanted.clip_grad)
    trainer = DraftTrainer(replace(model, temperature=temperature), settings, None)
    count = wanted.num_optimizer_steps * wanted.batch_size
    max_rows = rows_of_reply(wanted, spec.num_block_drafts)
    chosen = choose_replies(samples, count, max_rows, f"{config.run.seed}/draft/0")
    for start in range(0, count, wanted.batch_size):
        sequences = []
        for reply in [each for each in chosen if set(each.slots) & set(range(start, start + wanted.batch_size))]:
            sample = samples[reply.sample_index]
            prompt_len = sample.prompt_len + reply.first
            sequences.append(DraftSequence(0, sample.token_ids[: prompt_len + reply.num_rows + 1], prompt_len, ""))
        trainer.step(whole_batch(sequences, target, temperature))
    return trainer


def whole_batch(sequences: Sequence[DraftSequence], target: FrozenTarget, temperature: float) -> TrainBatch:
    known = [target.features([sequence])[0] for sequence in sequences]
    logits = [each.final @ target.head.T for each in known]
    return TrainBatch(
        token_ids=padded([torch.tensor(each.token_ids) for each in sequences]),
        features=padded([each.features for each in known]),
        starts=torch.tensor([each.prompt_len - 1 for each in sequences]),
        reply_lens=torch.tensor([len(each.reply) for each in sequences]),
        final=padded([each.final for each in known]),
        argmax=padded([each.argmax for each in known]),
        logsumexp=padded([(each / temperature).logsumexp(-1) for each in logits]),
    )
