"""The benchmarks measure this EAGLE-3 draft, in these shapes; vLLM reads it in its own convention."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slime_spec.algorithms import EAGLE3
from slime_spec.bench.local_engine import engine_config
from slime_spec.bench.rows import BenchOptions
from slime_spec.checkpoints.draft_choice import choose_draft
from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.folder import CONFIG, CheckpointFolder
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import Config
from slime_spec.interfaces import unknown_choice

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Shape:
    """Holds SGLang's three numbers of a draft: depth, branches per step, tokens verified per round."""

    num_steps: int
    topk: int
    num_draft_tokens: int

    @property
    def name(self) -> str:
        """Return a short name: ``Shape(3, 1, 4).name == "s3k1n4"``."""
        return f"s{self.num_steps}k{self.topk}n{self.num_draft_tokens}"


# Short and long chains, a small tree, and SGLang's own choice for a Llama.
SHAPES = (Shape(2, 1, 3), Shape(3, 1, 4), Shape(5, 1, 6), Shape(7, 1, 8), Shape(3, 2, 6), Shape(5, 4, 8))
# The chains among the shapes, which rejection sampling and other engines can run too.
CHAINS = tuple(shape for shape in SHAPES if shape.topk == 1)


def chosen_shapes(options: BenchOptions) -> tuple[Shape, ...]:
    """Return the shapes that the options name, or all of SHAPES; raises ConfigError for an unknown name."""
    by_name = {shape.name: shape for shape in SHAPES}
    for name in options.shapes:
        if name not in by_name:
            raise unknown_choice("--shapes", by_name, name)
    return tuple(by_name[name] for name in options.shapes or by_name)


def with_draft_tokens(config: Config, count: int) -> Config:
    """Return the same configuration with ``count`` verified tokens a round, the root included."""
    return replace(config, speculative=replace(config.speculative, num_draft_tokens=count))


def eagle3_config(options: BenchOptions, dtype: str, shape: Shape, **speculative: Any) -> Config:
    """Configure an engine that drafts with ``options.draft``; ``speculative`` are more settings of that section."""
    config = engine_config(options.model, dtype, EAGLE3.name, options.num_gpus or 0)
    settings = replace(
        config.speculative,
        draft_model_path=options.draft,
        num_steps=shape.num_steps,
        eagle_topk=shape.topk,
        num_draft_tokens=shape.num_draft_tokens,
        **speculative,
    )
    return replace(config, speculative=settings)


def vllm_draft_folder(options: BenchOptions, folder: Path) -> Path:
    """Write the draft for vLLM, whose layer ids name a layer's input; here and in SGLang they name a layer's output."""
    target = ModelSpec.from_folder(options.model)
    draft = choose_draft(eagle3_config(options, "bfloat16", CHAINS[0]), target)
    assert draft is not None, "the algorithm has a draft"
    assert isinstance(draft.spec, DraftSpec), "whose spec is a draft network's"
    config = CheckpointFolder(draft.folder).json(CONFIG)
    inputs_of = [layer + 1 for layer in draft.spec.capture_layers]
    config["eagle_config"] = {**config.get("eagle_config", {}), "eagle_aux_hidden_state_layer_ids": inputs_of}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / WEIGHTS).symlink_to((draft.folder / WEIGHTS).absolute())
    return folder
