"""What a rank does in a test; each function runs in a process of its own, called by run_ranks."""

import hashlib
import logging
import resource
from collections.abc import Sequence
from dataclasses import replace

import torch
from megatron.core import parallel_state as mpu

from slime_spec.bench.reference_trainer import tiny_samples
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.config.tree import Config
from slime_spec.errors import CheckpointError, ConfigError, TrainingError
from slime_spec.interfaces import RunState
from slime_spec.types import TrainReport, TrainSample
from slime_spec.weights.messages import Manifest, NamedTensors, PushBucket
from slime_spec.weights.receive import PushReceiver
from trainer_bridge.layout import Layout, RankCoordinates
from trainer_bridge.megatron.adam_state import _shard
from trainer_bridge.megatron.attention import SegmentAttention, attend_segments
from trainer_bridge.megatron.cpu_shim import cpu_shim
from trainer_bridge.megatron.model import hf_tensors
from trainer_bridge.megatron.policy_step import accumulate_gradients, with_reference_logprobs
from trainer_bridge.megatron.process_groups import process_groups
from trainer_bridge.megatron.rank import TrainerRank
from trainer_bridge.megatron.residency import Residency
from trainer_bridge.microbatch import build_microbatch
from trainer_bridge.packing import plan_microbatches
from trainer_bridge.policy_loss import PolicyLoss, PolicyTerms


def weights_of(worker: TrainerRank) -> dict[str, torch.Tensor]:
    """Every tensor this rank's stage holds."""
    return {name: tensor.clone() for name, tensor in hf_tensors(worker.model, worker.spec)}


def train(
    rank: int,
    init_method: str,
    config: Config,
    batches: Sequence[Sequence[TrainSample]],
    leaves_out_flat: bool = True,
) -> tuple[dict[str, torch.Tensor], list[TrainReport], dict[str, torch.Tensor]]:
    """Weights as loaded, one report per batch, weights after; ``leaves_out_flat=False`` passes over flat samples."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    worker.leaves_out_flat = worker.leaves_out_flat and leaves_out_flat
    before = weights_of(worker)
    reports = [worker.step(batch) for batch in batches]
    after = weights_of(worker)
    worker.close()
    return before, reports, after


def updated_values(rank: int, init_method: str, config: Config) -> dict[str, tuple[int, torch.Tensor]]:
    """What this rank's optimizer updates of each parameter, flattened, and where in the parameter that begins."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    (only,) = worker.optimizer.chained_optimizers
    shards = {name: _shard(only, parameter) for name, parameter in worker.model.named_parameters()}
    values = {name: (each.start, each.main.detach().flatten().clone()) for name, each in shards.items() if each}
    worker.close()
    return values


def logprobs_and_gradients(
    rank: int, init_method: str, config: Config, samples: Sequence[TrainSample], share_prompts: bool
) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Each sample's response logprobs, and the gradients of one policy step."""

    worker = TrainerRank(config, rank, init_method)
    worker.load()
    plans = plan_microbatches(samples, config.trainer.max_tokens_per_microbatch, 1, share_prompts)[0]
    microbatches = [build_microbatch(samples, plan, torch.device("cpu")) for plan in plans]
    with cpu_shim():
        scored = with_reference_logprobs(worker.model, microbatches, worker.temperature)
        worker.ddp.zero_grad_buffer()
        accumulate_gradients(worker.ddp, microbatches, worker.loss, worker.temperature)
    logprobs: list[list[float]] = [[] for _ in samples]
    for plan, microbatch in zip(plans, scored, strict=True):
        flat = iter(microbatch.ref_logprobs.tolist())
        for segment in plan:
            for index, length in zip(segment.sample_indices, segment.response_lens, strict=True):
                logprobs[index] = [next(flat) for _ in range(length)]
    gradients = {name: param.main_grad.clone() for name, param in worker.model.named_parameters()}
    worker.close()
    return logprobs, gradients


def save_and_continue(
    rank: int,
    init_method: str,
    config: Config,
    batches: Sequence[Sequence[TrainSample]],
    more: Sequence[Sequence[TrainSample]],
    folder: str,
    state: RunState,
) -> list[TrainReport]:
    """Train, save, and report the steps that follow without interruption."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    for batch in batches:
        worker.step(batch)
    worker.save(folder, state)
    reports = [worker.step(batch) for batch in more]
    worker.close()
    return reports


def resume(
    rank: int, init_method: str, config: Config, batches: Sequence[Sequence[TrainSample]]
) -> tuple[RunState, list[TrainReport]]:
    worker = TrainerRank(config, rank, init_method)
    state = worker.load()
    reports = [worker.step(batch) for batch in batches]
    worker.close()
    return state, reports


def save_onto_a_full_disk(rank: int, init_method: str, config: Config, folder: str) -> str:
    """A good save, then one whose files may not grow beyond 16 KiB; returns the error's text."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    worker.save(folder, RunState(1, 8, 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, resource.RLIM_INFINITY))
    try:
        worker.save(folder, RunState(2, 16, 2))
    except ConfigError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        worker.close()
    return ""


def export_onto_a_full_disk(rank: int, init_method: str, config: Config, folder: str) -> str:
    """A good export, then one whose files may not grow beyond 16 KiB; returns the error's text."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    worker.export_hf(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, resource.RLIM_INFINITY))
    try:
        worker.export_hf(folder)
    except ConfigError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        worker.close()
    return ""


def resumed_hyperparameters(rank: int, init_method: str, config: Config) -> list[dict[str, object]]:
    """What each parameter group applies in the step after a resume, and how many steps its moments have seen."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    worker.step(tiny_samples(seed=5))
    optimizer = worker.optimizer
    groups = [
        {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")} for group in optimizer.param_groups
    ]
    for group, applied in zip(optimizer.param_groups, groups, strict=True):
        applied["steps"] = int(optimizer.optimizer.state[group["params"][0]]["step"])
    worker.close()
    return groups


def poisoned_step(
    rank: int, init_method: str, config: Config, samples: Sequence[TrainSample]
) -> tuple[str, bool, float]:
    """The error's text, whether every weight is as it was, and the gradient norm of a good step afterwards."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    worker.step(tiny_samples(seed=5))
    before, problem = weights_of(worker), ""
    try:
        worker.step(samples)
    except TrainingError as error:
        problem = str(error)
    after = weights_of(worker)
    unchanged = all(torch.equal(before[name], tensor) for name, tensor in after.items())
    grad_norm = worker.step(tiny_samples(seed=6)).grad_norm
    worker.close()
    return problem, unchanged, grad_norm


def export(rank: int, init_method: str, config: Config, folder: str) -> None:
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    worker.export_hf(folder)
    worker.close()


def leave_between_phases(
    rank: int, init_method: str, config: Config, batches: Sequence[Sequence[TrainSample]], folder: str, state: RunState
) -> tuple[dict[str, dict[str, int]], list[TrainReport], dict[str, torch.Tensor]]:
    """Train with tensors that leave the CPU as they leave a GPU.

    Returns each part's bytes on the device by phase, the reports, and the weights that were pushed. Saves at the end.
    """
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    resident = {"load": _device_bytes(worker)}
    resident["counted"] = {"parameters": sum(parameter.numel() for parameter in worker.model.parameters())}
    worker.residency = Residency(worker.parts(), "cpu")
    worker.residency.hold()
    resident["rollout"] = _device_bytes(worker)

    class SeenLoss(PolicyLoss):
        def __call__(self, *args: object) -> PolicyTerms:
            resident["step"] = _device_bytes(worker)
            return super().__call__(*args)

    worker.loss = SeenLoss(config.algorithm)
    reports = [worker.step(batch) for batch in batches]
    resident["between"] = _device_bytes(worker)
    pushed = {}
    for bucket in worker.push_buckets(1, KeepingTransport()):
        resident["push"] = _device_bytes(worker)
        if bucket is not None:
            pushed |= zip((meta.name for meta in bucket.tensors), bucket.handle, strict=True)
    worker.end_push()
    worker.save(folder, state)
    resident["end"] = _device_bytes(worker)
    worker.close()
    return resident, reports, pushed


def _device_bytes(worker: TrainerRank) -> dict[str, int]:
    held = {}
    for part, tensors in worker.parts().items():
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors()}
        held[part.value] = sum(storages.values())
    return held


class KeepingTransport:
    """Implements WeightTransport inside one process: the handle is the tensors themselves."""

    lends = False

    def open(self, host: str, num_engines: int) -> None:
        pass

    def join(self, routes: Sequence[None], engine_index: int) -> None:
        pass

    def publish(self, named: NamedTensors) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.clone() for _, tensor in named)

    def receive(self, bucket: PushBucket) -> list[torch.Tensor]:
        return list(bucket.handle)

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


def push_to_a_receiver(rank: int, init_method: str, config: Config, every_rank: bool = False) -> tuple[int, list[str]]:
    """Number of buckets, and the names of the tensors a receiver verified."""

    worker = TrainerRank(config, rank, init_method)
    worker.load()
    transport = KeepingTransport()
    buckets = [bucket for bucket in worker.push_buckets(3, transport, every_rank) if bucket is not None]
    shapes = expected_shapes(worker.spec)
    metas = {meta.name: meta for bucket in buckets for meta in bucket.tensors}
    mine = {name: shape for name, shape in shapes.items() if name in metas}
    receiver = PushReceiver(Manifest("target", 3, tuple(metas.values())), mine)
    for bucket in buckets:
        receiver.take(bucket, transport.receive(bucket))
    receiver.finish(receiver.checksum)
    worker.close()
    return len(buckets), list(metas)


def step_error(rank: int, init_method: str, config: Config, samples: Sequence[TrainSample]) -> str:
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    try:
        worker.step(samples)
    except ConfigError as error:
        return str(error)
    finally:
        worker.close()
    return ""


def group_coordinates(rank: int, init_method: str, layout: Layout) -> RankCoordinates:

    with process_groups(layout, rank, init_method, seed=0):
        return RankCoordinates(
            tensor=mpu.get_tensor_model_parallel_rank(),
            data=mpu.get_data_parallel_rank(),
            pipeline=mpu.get_pipeline_model_parallel_rank(),
        )


def save_two_steps(rank: int, init_method: str, config: Config, folder: str) -> list[str]:
    """Save after each of two steps; returns a digest of weights and moments at each."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    digests = []
    for step in (1, 2):
        worker.step(tiny_samples(step))
        worker.save(folder, RunState(step, 8 * step, step))
        digests.append(_digest(worker))
    worker.close()
    return digests


def load_each(rank: int, init_method: str, config: Config, folders: Sequence[str]) -> list[tuple[str, str]]:
    """Load each of ``folders`` in turn: a digest of weights and moments and "", or "" and the ConfigError's text."""
    outcomes = []
    for index, folder in enumerate(folders):
        worker = TrainerRank(
            replace(config, trainer=replace(config.trainer, load=folder)), rank, f"{init_method}{index}"
        )
        try:
            worker.load()
            outcomes.append((_digest(worker), ""))
        except ConfigError as error:
            outcomes.append(("", str(error)))
        worker.close()
    return outcomes


def _digest(worker: TrainerRank) -> str:
    state = worker.optimizer.optimizer.state
    updated = [parameter for group in worker.optimizer.param_groups for parameter in group["params"]]
    moments = [state[parameter][name] for parameter in updated for name in ("exp_avg", "exp_avg_sq")]
    digest = hashlib.sha256()
    for tensor in [*(parameter.detach() for _, parameter in sorted(worker.model.named_parameters())), *moments]:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def saved_for_backward(
    rank: int, init_method: str, config: Config, samples: Sequence[TrainSample], as_a_gpu: bool
) -> tuple[int, int]:
    """Bytes that one microbatch's layers, norms, head and loss save for the backward pass, and its number of tokens."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    if as_a_gpu:
        for module in worker.model.modules():
            if isinstance(module, SegmentAttention):
                module.attend = attend_segments
    (plan,) = plan_microbatches(samples, config.trainer.max_tokens_per_microbatch, 1)[0]
    (microbatch,) = worker._microbatches(samples, [plan])
    weights = {parameter.untyped_storage()._cdata for parameter in worker.model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    with cpu_shim(), torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        worker.ddp.zero_grad_buffer()
        accumulate_gradients(worker.ddp, [microbatch], worker.loss, worker.temperature)
    worker.close()
    return sum(storage.nbytes() for storage in saved.values()), microbatch.token_ids.numel()


def told_by_loading(rank: int, init_method: str, config: Config) -> str:
    """What loading a checkpoint says in the log, or raises."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("trainer_bridge").addHandler(handler)
    worker = TrainerRank(config, rank, init_method)
    try:
        worker.load()
    except CheckpointError as error:
        return str(error)
    finally:
        worker.close()
    return " ".join(heard)
