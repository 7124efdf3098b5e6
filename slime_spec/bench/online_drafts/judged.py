"""Judge drafts on replies of a finished policy to prompts that no draft has seen, without drawing a draft.

What a draft brings an engine that samples it is a closed form of the reply's own probabilities (draft.training.served).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch

from slime_spec.bench.local_engine import engine_config, started_engine
from slime_spec.bench.prompts import in_domain
from slime_spec.bench.rows import BenchOptions
from slime_spec.checkpoints.draft_location import BUILTIN, builtin_folder
from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import load_draft
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.draft.build import load_network
from slime_spec.draft.training.batch import TrainBatch, collate
from slime_spec.draft.training.loss import LOSSES
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.training.online import hot_token_ids
from slime_spec.draft.training.sequence import DraftSequence
from slime_spec.draft.training.served import RULES, Rule, ServedTally, standing
from slime_spec.draft.training.target import FrozenTarget
from slime_spec.draft.training.unrolled import Objective, unrolled_loss
from slime_spec.draft.training.vocabulary import DraftVocabulary
from slime_spec.types import GroupRequest, SamplingParams

NUM_SAMPLES = 8
LONGEST = 40
TEMPERATURES = (1.0, 0.8, 0.6, 0.4)
BATCH = 16
Judged = Mapping[tuple[Rule, float], float]


class Judge:
    """Holds a policy's replies to held-out prompts, and what its passes over them say."""

    def __init__(self, policy: Path, options: BenchOptions, num_prompts: int, depth: int) -> None:
        self._policy, self._depth = policy, depth
        self._target = ModelSpec.from_folder(policy)
        self.sequences = list(_replies(policy, options, num_prompts))

    def __call__(self, folder: str) -> Judged:
        """Return the tokens per round that a draft would bring, by rule and draft temperature."""
        draft = builtin_folder(folder) if folder.startswith(BUILTIN) else folder
        spec = DraftSpec.from_folder(draft, self._target)
        frozen = FrozenTarget(self._policy, self._target, spec.capture_layers, torch.float32, torch.device("cpu"))
        checkpoint = load_draft(draft, spec)
        vocabulary = DraftVocabulary(hot_token_ids(checkpoint), self._target.vocab_size)
        model = DraftModel.of(load_network(spec, checkpoint.tensors), frozen.embedding, frozen.head, vocabulary)
        tallies = {(rule, each): ServedTally(self._depth) for rule in RULES for each in TEMPERATURES}
        for start in range(0, len(self.sequences), BATCH):
            sequences = self.sequences[start : start + BATCH]
            known = dict(zip((each.index for each in sequences), frozen.features(sequences), strict=True))
            batch = collate(sequences, known, torch.device("cpu"))
            for temperature in TEMPERATURES:
                ratios = self._log_ratios(_tempered(model, temperature), batch)
                for index, reply_len in enumerate(batch.reply_lens.tolist()):
                    for rule in RULES:
                        tallies[rule, temperature].count(standing(ratios[index, : reply_len - 1].numpy(), rule))
        return {key: tally.tokens_per_verify for key, tally in tallies.items()}

    @property
    def mean_len(self) -> float:
        return sum(len(each.reply) for each in self.sequences) / len(self.sequences)

    @property
    def ceiling(self) -> float:
        """Return the tokens per round of a draft that always stands: replies end, and cut their last round."""
        tally = ServedTally(self._depth)
        for sequence in self.sequences:
            tally.count(np.ones((len(sequence.reply) - 1, self._depth)))
        return tally.tokens_per_verify

    @torch.no_grad()
    def _log_ratios(self, model: DraftModel, batch: TrainBatch) -> torch.Tensor:
        objective = Objective(LOSSES["total_variation"], self._depth, 1.0)
        return unrolled_loss(model, batch, objective).quality.log_ratios.double()


class _Tempered(DraftModel):
    """Draws drafts at another temperature than the policy's tokens, as the target's distribution stays."""

    def target_logits(self, final: torch.Tensor) -> torch.Tensor:
        return super().target_logits(final) * self.temperature


def _tempered(model: DraftModel, temperature: float) -> DraftModel:
    return replace(_Tempered(**vars(model)), temperature=temperature)


def _replies(policy: Path, options: BenchOptions, num_prompts: int) -> Iterator[DraftSequence]:
    """Sample replies at temperature 1, several to a prompt; those too short for a draft are left out."""
    params = SamplingParams(LONGEST, temperature=1.0)
    with started_engine(engine_config(policy, "float32")) as engine:
        generations = [
            (prompt, engine.generate(GroupRequest(str(number), prompt, _seeds(number), params)))
            for number, prompt in enumerate(in_domain(policy, num_prompts, options.seeds[0]))
        ]
        index = count()
        for prompt, generation in generations:
            for sample in generation:
                if len(sample.token_ids) > 1:
                    yield DraftSequence(next(index), (*prompt, *sample.token_ids), len(prompt), "")


def _seeds(number: int) -> tuple[int, ...]:
    return tuple(NUM_SAMPLES * number + sample for sample in range(NUM_SAMPLES))
