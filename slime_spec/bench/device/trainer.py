"""Measure the trainer's step by itself: tokens per second, its share of the matmul rate, memory, and the loss it has.

Memory is held against the memory plan's account of the same step, and the trainer leaves the device and returns, as it
does around a rollout on a GPU that it shares.

Weights are random, and a rank is alone in its group (nccl on a GPU, gloo on a CPU). The first step of a small batch in
fp32 is made a second time by another process that sees no GPU: both must have the same loss and gradient norm.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.multiprocessing

from slime_spec.bench.device.ceilings import matmul_flops, sizes_on
from slime_spec.bench.device.random_model import SHAPES, num_weights, write_random_checkpoint
from slime_spec.bench.local_engine import device_of
from slime_spec.bench.lone_rank import lone_rank
from slime_spec.bench.plain import SHORT
from slime_spec.bench.rows import BenchOptions, Row, at_most
from slime_spec.bench.timing import interleaved, median_s
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.parameters import count_parameters
from slime_spec.config.tree import ClusterConfig, Config, ModelConfig, TrainerConfig
from slime_spec.files import read_json
from slime_spec.preflight.trainer_memory import trainer_memory
from slime_spec.types import TrainReport, TrainSample
from trainer_bridge.megatron.rank import TrainerRank
from trainer_bridge.megatron.residency import Residency

CHILD_S = 120.0
LEFT_BEHIND = 0.05  # of the trainer's memory: cuBLAS keeps a workspace
# Operators of a layer one after the other whose results are rounded, and the unit roundoff of fp32.
ROUNDINGS_PER_LAYER, ROUNDOFF = 8, 2.0**-24
FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Batch:
    """Describes a step's batch: responses to different prompts, so that every token is computed once."""

    num_samples: int
    prompt_len: int
    response_len: int
    max_tokens_per_microbatch: int

    @property
    def num_tokens(self) -> int:
        return self.num_samples * (self.prompt_len + self.response_len)

    def samples(self, vocab_size: int, seed: int) -> list[TrainSample]:
        """Make samples of uniform tokens, with the logprobs of a policy that knows nothing."""
        rng = random.Random(seed)
        length, logprobs = self.prompt_len + self.response_len, (-math.log(vocab_size),) * self.response_len
        return [
            TrainSample(tuple(rng.choices(range(vocab_size), k=length)), self.prompt_len, logprobs, rng.gauss(0.0, 1.0))
            for _ in range(self.num_samples)
        ]


@dataclass(frozen=True)
class TrainerSizes:
    """Holds the shape, the batch that is timed in ``dtype``, the batch that is compared, and the timed steps."""

    shape: str
    dtype: str
    timed: Batch
    compared: Batch
    num_rounds: int


def sizes_of(device: torch.device, num_rounds: int) -> TrainerSizes:
    if device.type == "cuda":
        return TrainerSizes("135m", "bfloat16", Batch(64, 64, 448, 8192), Batch(4, 32, 64, 512), num_rounds)
    return TrainerSizes("tiny", "float32", Batch(4, 8, 24, 64), Batch(2, 8, 16, 64), min(num_rounds, 2))


def measure(options: BenchOptions) -> list[Row]:
    device = device_of(options.num_gpus)
    peak_flops = matmul_flops(device, sizes_on(device, options.num_rounds))
    return measure_trainer(device, sizes_of(device, options.num_rounds), peak_flops, options.seeds[0])


def measure_trainer(device: torch.device, sizes: TrainerSizes, peak_flops: float, seed: int = 0) -> list[Row]:
    """Compare a step with the CPU's, then time steps; ``peak_flops`` is the device's matmul rate in bf16, FLOP/s."""
    spec = SHAPES[sizes.shape]
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_random_checkpoint(folder, spec, torch.float32, device, seed)
        rows = _agreement_rows(folder, spec, sizes, seed)
        return rows + _speed_rows(folder, spec, device, sizes, peak_flops, seed)


def rank_config(folder: Path, dtype: str, batch: Batch, num_gpus: int) -> Config:
    return Config(
        model=ModelConfig(hf_checkpoint=str(folder)),
        trainer=TrainerConfig(
            num_gpus=num_gpus,
            dtype=dtype,
            max_tokens_per_microbatch=batch.max_tokens_per_microbatch,
            num_cpus_per_rank=os.cpu_count() or 1,
        ),
        cluster=ClusterConfig(colocate=False),  # nothing leaves the device between steps
    )


def first_step(connection: Connection, folder: Path, batch: Batch, samples: Sequence[TrainSample]) -> None:
    """Run in the other process: make one step on the CPU and send its report."""
    assert not torch.cuda.is_available(), "this side must see no GPU"
    with lone_rank(rank_config(folder, "float32", batch, 0)) as rank:
        connection.send(rank.step(samples))


def _agreement_rows(folder: Path, spec: ModelSpec, sizes: TrainerSizes, seed: int) -> list[Row]:
    samples = sizes.compared.samples(spec.vocab_size, seed)
    theirs, child = torch.multiprocessing.get_context("spawn").Pipe()
    arguments = (child, folder, sizes.compared, samples)
    process = torch.multiprocessing.get_context("spawn").Process(target=first_step, args=arguments, daemon=True)
    with _no_gpu():
        process.start()
    child.close()
    try:
        with lone_rank(rank_config(folder, "float32", sizes.compared, int(torch.cuda.is_available()))) as rank:
            ours: TrainReport = rank.step(samples)
        if not theirs.poll(CHILD_S):
            raise TimeoutError(f"the step on the CPU did not end in {CHILD_S:g} s")
        expected: TrainReport = theirs.recv()
    finally:
        process.kill()
        process.join()
        theirs.close()
    words = f"{sizes.shape}, random fp32 weights, the first step of {sizes.compared.num_tokens} tokens"
    return agreement_rows(f"device.{sizes.shape}.train.fp32", words, ours, expected, tolerance(spec))


def agreement_rows(prefix: str, words: str, ours: TrainReport, expected: TrainReport, bound: float) -> list[Row]:
    """Hold the loss to ``bound``, and the gradient norm to what a backward pass adds to it."""
    loss_apart, norm_apart = abs(ours.loss - expected.loss), abs(ours.grad_norm / expected.grad_norm - 1.0)
    norm = f"{words}: |gradient norm over the CPU's - 1|"
    return [
        Row(f"{prefix}.loss", f"{words}: loss", ours.loss, "nats"),
        at_most(f"{prefix}.loss_diff", f"{words}: |loss - the CPU's|", loss_apart, "nats", bound),
        at_most(f"{prefix}.grad_norm_diff", norm, norm_apart, "share", FORWARD_AND_BACKWARD * bound),
    ]


@contextmanager
def _no_gpu() -> Iterator[None]:
    """Hide the GPUs from the processes that start in the block."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def tolerance(spec: ModelSpec) -> float:
    """Return how far two fp32 losses may be apart: each layer's roundings, relative to a logprob of log(vocabulary).

    Ratios and advantages are around 1, so that the loss errs as a logprob does.
    """
    return ROUNDINGS_PER_LAYER * spec.num_layers * ROUNDOFF * math.log(spec.vocab_size)


def _speed_rows(
    folder: Path, spec: ModelSpec, device: torch.device, sizes: TrainerSizes, peak_flops: float, seed: int
) -> list[Row]:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    samples = sizes.timed.samples(spec.vocab_size, seed)
    short = SHORT[sizes.dtype]
    prefix = f"device.{sizes.shape}.train.{short}"
    with lone_rank(rank_config(folder, sizes.dtype, sizes.timed, int(on_gpu))) as rank:
        times = interleaved("steps of the trainer", sizes.num_rounds, {"step": lambda turn: rank.step(samples)})
        memory = _plan_rows(rank, folder, device, prefix, f"{sizes.shape} in {short}")
        memory += _offload_rows(rank, device, sizes.num_rounds, prefix, f"{sizes.shape} in {short}")
    seconds, num_tokens = median_s(times["step"]), sizes.timed.num_tokens
    flops = 6 * num_weights(spec) * num_tokens / seconds
    microbatches = times["step"][0].result.num_microbatches
    words = f"{sizes.shape}, random {short} weights, a step of {num_tokens} tokens in {microbatches} microbatches"
    formula = "6 x weights x tokens / seconds, attention left out, over the measured bf16 matmul rate"
    return [
        Row(f"{prefix}.step", f"{words}: forward, backward, AdamW", seconds, "s"),
        Row(f"{prefix}.tokens_per_s", f"{words}: prompt and response", num_tokens / seconds, "tokens/s"),
        Row(f"{prefix}.mfu", f"{words}: {formula}", flops / peak_flops, "share"),
        *memory,
    ]


def _plan_rows(rank: TrainerRank, folder: Path, device: torch.device, prefix: str, words: str) -> list[Row]:
    """Hold the most memory that tensors took at once, so far, to what the memory plan says of a step."""
    target = read_json(folder / "config.json")
    counted = count_parameters(target)
    assert counted is not None, "the shape is a decoder's"
    (plan,) = trainer_memory(rank.config, target, counted)
    planned = plan.kept_bytes + max(plan.activation_bytes + plan.logits_bytes, plan.update_bytes)
    rows = [Row(f"{prefix}.memory_planned", f"{words}: memory of a step, by the memory plan", planned / 1e9, "GB")]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        what = f"{words}: most memory of tensors at once"
        rows.append(Row(f"{prefix}.memory_peak", what, peak / 1e9, "GB"))
        rows.append(at_most(f"{prefix}.memory_peak.share", f"{what}, over the plan's", peak / planned, "share", 1.0))
    return rows


def _offload_rows(rank: TrainerRank, device: torch.device, num_rounds: int, prefix: str, words: str) -> list[Row]:
    """Time a turn of the trainer on the device without its step, and count what it leaves behind."""
    whole = _device_bytes(rank)
    rank.residency = Residency(rank.parts(), device.type)
    rank.residency.hold()
    left = torch.cuda.memory_allocated(device) if device.type == "cuda" else _device_bytes(rank)

    def turn(_: int) -> None:
        with rank.residency.stepping():
            pass

    seconds = median_s(interleaved("turns of the trainer", num_rounds, {"turn": turn})["turn"])
    what = f"{words}: the trainer's {whole / 1e9:.3g} GB come to the device and leave it"
    stays = f"{words}: bytes on the device while the trainer is away, over its own"
    return [
        Row(f"{prefix}.offload", what, seconds, "s"),
        at_most(f"{prefix}.offload.left", stays, left / whole, "share", LEFT_BEHIND),
    ]


def _device_bytes(rank: TrainerRank) -> int:
    storages = [tensor.untyped_storage() for tensors in rank.parts().values() for tensor in tensors()]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
