"""Compare the Megatron trainer with Hugging Face and AdamW in every layout, and a resumed run with a whole run.

A small random policy with a large learning rate is trained: its weights move a hundred times the allowed difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.progress import track
from transformers.utils.logging import disable_progress_bar

from slime_spec.bench.reference_trainer import near_policy, reference_steps, tiny_samples
from slime_spec.bench.rows import BenchOptions, Row, at_most
from slime_spec.checkpoints.families.llama import LLAMA
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes, load_tensors, save_checkpoint
from slime_spec.config.tree import AlgorithmConfig, Config, ModelConfig, RunConfig, TrainerConfig
from slime_spec.interfaces import RunState
from slime_spec.launch.cluster import cluster
from slime_spec.placement import Placement
from slime_spec.types import TrainReport, TrainSample
from trainer_bridge.megatron.group import MegatronGroup

NUM_STEPS, NUM_MORE_STEPS = 3, 2
# The sizes that two tensor ranks and two pipeline stages can share.
POLICY: Mapping[str, object] = {
    "architectures": [LLAMA.architecture],
    "model_type": LLAMA.model_type,
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
TRAINER = TrainerConfig(num_cpus_per_rank=1, lr=1e-2, max_tokens_per_microbatch=64)
LAYOUTS = {
    "1x1": TRAINER,
    "tp2": replace(TRAINER, world_size=2, tensor_model_parallel_size=2),
    "pp2": replace(TRAINER, world_size=2, pipeline_model_parallel_size=2),
    "dp2": replace(TRAINER, world_size=2),
}
Batches = Sequence[Sequence[TrainSample]]
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Trained:
    """Holds the reports of a trainer's steps, and the policy after them."""

    reports: list[TrainReport]
    weights: Weights


def measure(options: BenchOptions) -> list[Row]:
    disable_progress_bar()
    with TemporaryDirectory() as scratch:
        policy = random_policy(Path(scratch) / "policy", options.seeds[0])
        return parity_rows(policy, Path(scratch), options.seeds[0], list(LAYOUTS))


def random_policy(folder: Path, seed: int) -> Path:
    """Write a random checkpoint of POLICY's sizes, with weights large enough for distributions far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(ModelSpec.from_dict(POLICY))
    # A vector is the weight of a norm: a scale near 1.
    tensors = {n: 0.2 * torch.randn(s, generator=generator) + (1.0 if len(s) == 1 else 0.0) for n, s in shapes.items()}
    save_checkpoint(folder, tensors.items(), POLICY)
    return folder


def parity_rows(policy: Path, scratch: Path, seed: int, layouts: Sequence[str]) -> list[Row]:
    """Compare, for every layout, the first steps with the reference and the next steps with a resumed run's."""
    spec = ModelSpec.from_folder(policy)
    batches = [near_policy(policy, tiny_samples(100 * seed + i)) for i in range(NUM_STEPS + NUM_MORE_STEPS)]
    expected = Trained(*reference_steps(_config(policy, LAYOUTS["1x1"]), batches[:NUM_STEPS]))
    widest = _config(policy, LAYOUTS["dp2"])
    rows = [_moved_row(expected.weights, load_tensors(policy, spec))]
    with cluster(widest, spec) as reserved:
        for name in track(layouts, "training in every layout", console=Console(stderr=True), transient=True):
            config, place = _config(policy, LAYOUTS[name]), scratch / name
            first, more = train_and_continue(config, reserved.ranks, batches, place)
            resumed = resume(config, reserved.ranks, batches[NUM_STEPS:], place)
            rows += reference_rows(name, first, expected)
            rows += resume_rows(name, more, resumed)
    return rows


def train_and_continue(config: Config, ranks: Placement, batches: Batches, place: Path) -> tuple[Trained, Trained]:
    """Train NUM_STEPS steps, save a checkpoint in ``place``, and train the steps after it."""
    group = MegatronGroup(config, ranks)
    try:
        group.load()
        first = _steps(group, batches[:NUM_STEPS], place / "first")
        group.save(str(place / "checkpoints"), RunState(NUM_STEPS, NUM_STEPS, NUM_STEPS))
        return first, _steps(group, batches[NUM_STEPS:], place / "more")
    finally:
        group.stop()


def resume(config: Config, ranks: Placement, batches: Batches, place: Path) -> Trained:
    """Run the steps after the checkpoint in ``place``, in new processes."""
    loading = replace(config, trainer=replace(config.trainer, load=str(place / "checkpoints")))
    group = MegatronGroup(loading, ranks)
    try:
        state = group.load()
        assert state == RunState(NUM_STEPS, NUM_STEPS, NUM_STEPS), f"the checkpoint says {state}"
        return _steps(group, batches, place / "resumed")
    finally:
        group.stop()


def _steps(group: MegatronGroup, batches: Batches, export: Path) -> Trained:
    reports = [group.step(batch) for batch in batches]
    group.export_hf(str(export))
    return Trained(reports, load_tensors(export, group.spec))


def _config(policy: Path, trainer: TrainerConfig) -> Config:
    return Config(
        run=RunConfig(mode="train_only"),
        model=ModelConfig(hf_checkpoint=str(policy)),
        trainer=trainer,
        algorithm=AlgorithmConfig(kl_loss_coef=0.1),
    )


def _moved_row(after: Weights, before: Weights) -> Row:
    least = min(float((after[name] - tensor).abs().max()) for name, tensor in before.items())
    what = f"least of all tensors: its largest change in {NUM_STEPS} steps (what agreement is worth)"
    return Row("parity.weights_moved", what, least, "weight")


def reference_rows(name: str, got: Trained, expected: Trained) -> list[Row]:
    what = f"{NUM_STEPS} steps of Megatron-Core {name} against Hugging Face with AdamW: largest"
    loss, weight = _differences(got, expected)
    return [
        at_most(f"parity.{name}.loss_diff", f"{what} |loss difference|", loss, "loss", 1e-4),
        at_most(f"parity.{name}.weight_diff", f"{what} |weight difference|", weight, "weight", 1e-3),
    ]


def resume_rows(name: str, got: Trained, resumed: Trained) -> list[Row]:
    what = f"{NUM_MORE_STEPS} steps after a checkpoint, {name}, in new processes against uninterrupted: largest"
    loss, weight = _differences(got, resumed)
    return [
        at_most(f"parity.{name}.resume_loss_diff", f"{what} |loss difference|", loss, "loss", 0.0),
        at_most(f"parity.{name}.resume_weight_diff", f"{what} |weight difference|", weight, "weight", 0.0),
    ]


def _differences(a: Trained, b: Trained) -> tuple[float, float]:
    """Return the largest absolute difference of a loss and of a weight."""
    loss = max(abs(x.loss - y.loss) for x, y in zip(a.reports, b.reports, strict=True))
    weight = max(float((tensor - b.weights[name]).abs().max()) for name, tensor in a.weights.items())
    return loss, weight
