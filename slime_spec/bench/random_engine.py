"""An engine of a named shape has random weights: costs are those of trained ones, and no checkpoint is needed.

What an engine reads from files is in a folder that goes away: the target's config.json, and a whole EAGLE-3 draft.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from rollout.embedded.assemble import Assembly
from slime_spec.bench.device.random_model import SCALE, SHAPES, random_tensors, shape_config
from slime_spec.bench.local_engine import device_of
from slime_spec.bench.prompts import Prompts
from slime_spec.bench.rows import BenchOptions
from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import draft_shapes, save_draft_checkpoint
from slime_spec.checkpoints.families.eagle3 import default_capture_layers
from slime_spec.checkpoints.folder import CONFIG
from slime_spec.checkpoints.model_spec import ModelSpec

DRAFT_VOCAB = 32_000  # of the published EAGLE-3 drafts for Llama
PROMPT_TOKENS = 64


class RandomAssembly(Assembly):
    """Builds an engine of random weights, made on the engine's device; its folder has a config.json alone."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return random_tensors(self.spec, self.dtype, self.device)


def assembly_of(options: BenchOptions) -> type[Assembly]:
    return Assembly if options.model_shape is None else RandomAssembly


@contextmanager
def random_engine(options: BenchOptions, dtype: torch.dtype) -> Iterator[BenchOptions]:
    """Yield the options with folders of the named shape, and of a draft for it, as model and draft."""
    assert options.model_shape is not None, "the caller has looked"
    spec = SHAPES[options.model_shape]
    with TemporaryDirectory(prefix="slime-spec-bench-") as name:
        target, draft = Path(name, "target"), Path(name, "draft")
        target.mkdir()
        (target / CONFIG).write_text(json.dumps(shape_config(spec, dtype)))
        draft_spec = random_draft_spec(spec)
        tensors = random_draft(draft_spec, dtype, device_of(options.num_gpus), options.seeds[0])
        stored = {name: tensor.cpu() for name, tensor in tensors}
        save_draft_checkpoint(draft, draft_spec, stored, torch.arange(draft_spec.draft_vocab_size))
        yield replace(options, model=target, draft=str(draft))


def random_draft_spec(target: ModelSpec) -> DraftSpec:
    """Return the EAGLE-3 draft of a target's sizes, as the published ones are: one block, a head of its own."""
    block = replace(target, num_layers=1, tie_word_embeddings=False, rope_scaling=None)
    layers = {max(0, layer) for layer in default_capture_layers(target.num_layers)}
    return DraftSpec(
        family="eagle3",
        block=block,
        target_hidden_size=target.hidden_size,
        draft_vocab_size=min(DRAFT_VOCAB, target.vocab_size),
        capture_layers=tuple(sorted(layers)),
        has_own_head=True,
    )


def random_draft(
    spec: DraftSpec, dtype: torch.dtype, device: torch.device, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of ``draft_shapes``: normal with deviation SCALE, norms around 1."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in draft_shapes(spec).items():
        tensor = torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(SCALE)
        yield name, tensor.add_(1.0) if len(shape) == 1 else tensor


def random_prompts(spec: ModelSpec, num_prompts: int, seed: int) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, spec.vocab_size, (num_prompts, PROMPT_TOKENS), generator=generator)
    return tuple(tuple(row) for row in ids.tolist())
