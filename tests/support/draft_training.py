"""A tiny target's own replies, and a draft in training on them: seconds of work in all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import load_tensors
from slime_spec.draft.build import make_network
from slime_spec.draft.training.feature_store import FeatureStore
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.training.sequence import DraftSequence, split
from slime_spec.draft.training.target import FrozenTarget
from slime_spec.draft.training.vocabulary import DraftVocabulary
from slime_spec.draft.training.warm_start import warm_start
from tests.support.embedded_harness import random_prompt
from tests.support.tiny_models import load_reference

HELD_OUT_PERCENT = 20


class Silent:
    """A Progress that tells nobody, and remembers."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, int, int]] = []

    def show(self, phase: str, done: int, wanted: int, note: str = "") -> None:
        self.shown.append((phase, done, wanted))


def tiny_corpus(target: Path, num_sequences: int = 60, reply_len: int = 20) -> list[DraftSequence]:
    """Greedy replies to random prompts of different lengths; every fifth is cut short."""
    model = load_reference(target)
    sequences = []
    for index in range(num_sequences):
        prompt = random_prompt(2 + index % 5, seed=index)
        out = model.generate(torch.tensor([prompt]), max_new_tokens=reply_len, do_sample=False)[0].tolist()
        cut = len(out) - 7 if index % 5 == 0 else len(out)
        sequences.append(DraftSequence(index, tuple(out[:cut]), len(prompt), "short" if index % 5 == 0 else "whole"))
    return sequences


@dataclass(frozen=True)
class Lesson:
    """Everything a training needs besides its settings."""

    spec: DraftSpec
    target: FrozenTarget
    learned: tuple[DraftSequence, ...]
    held_out: tuple[DraftSequence, ...]
    store: FeatureStore
    vocabulary: DraftVocabulary
    tensors: dict[str, torch.Tensor]

    def new_model(self) -> DraftModel:
        """The draft before its first update, always the same."""
        network = make_network(self.spec)
        warm_start(network, self.tensors, self.target.spec, self.vocabulary, seed=0)
        return DraftModel.of(network, self.target.embedding, self.target.head, self.vocabulary)


def make_lesson(folder: Path, target: Path, spec: DraftSpec, corpus: list[DraftSequence], vocab: int) -> Lesson:
    target_spec = ModelSpec.from_folder(target)
    frozen = FrozenTarget(target, target_spec, spec.capture_layers, torch.float32, torch.device("cpu"))
    learned, held_out = split(corpus, HELD_OUT_PERCENT)
    store = FeatureStore(folder / "features", frozen, "tiny", corpus)
    store.compute(Silent())
    vocabulary = DraftVocabulary.most_frequent(learned, target_spec.vocab_size, vocab)
    return Lesson(spec, frozen, learned, held_out, store, vocabulary, load_tensors(target, target_spec))
