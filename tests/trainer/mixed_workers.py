"""What a rank of a policy with experts or latent attention does in a test; called by run_ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from slime_spec.config.tree import Config
from slime_spec.transports.kept import Packed, packed_for_ray
from slime_spec.types import TrainSample
from tests.trainer.rank_workers import KeepingTransport
from trainer_bridge.megatron.cpu_shim import cpu_shim
from trainer_bridge.megatron.model import hf_names, hf_tensors
from trainer_bridge.megatron.policy_step import accumulate_gradients
from trainer_bridge.megatron.rank import TrainerRank

Tensors = dict[str, torch.Tensor]


def mixed_pass(
    rank: int, init_method: str, config: Config, samples: Sequence[TrainSample]
) -> tuple[Tensors, dict[int, torch.Tensor], Tensors, str]:
    """One pass over the samples.

    Returns this stage's weights as loaded, the logits of each response that this rank's replica has computed (on the
    last stage), this stage's gradients under Hugging Face names, and the dtype of the routers' biases.
    """
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    model = worker.model
    weights = {name: tensor.clone() for name, tensor in hf_tensors(model, worker.spec)}
    biases = {str(bias.dtype) for name, bias in model.named_buffers() if name.endswith("expert_bias")}
    seen: list[torch.Tensor] = []
    if model.post_process:
        model.output_layer.register_forward_hook(lambda module, args, output: seen.append(_whole(output[0][:, 0])))
    plans = worker._plans(samples)
    with cpu_shim():
        worker.ddp.zero_grad_buffer()
        accumulate_gradients(worker.ddp, worker._microbatches(samples, plans), worker.loss, worker.temperature)
    logits = {}
    for plan, of_microbatch in zip(plans, seen, strict=False):
        indices = [index for segment in plan for index in segment.sample_indices]
        lengths = [length for segment in plan for length in segment.response_lens]
        logits |= dict(zip(indices, of_microbatch.split(lengths), strict=True)) if plan else {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.main_grad)
    gradients = {name: tensor.clone() for name, tensor in hf_tensors(model, worker.spec)}
    worker.close()
    return weights, logits, gradients, " ".join(biases)


def _whole(logits: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(logits) for _ in range(mpu.get_tensor_model_parallel_world_size())]
    dist.all_gather(parts, logits.detach().contiguous(), group=mpu.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)


def names_read(rank: int, init_method: str, config: Config) -> list[str]:
    """The checkpoint's tensors that this rank reads."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    names = sorted(hf_names(worker.model, worker.spec))
    worker.close()
    return names


def pushed_dtypes(rank: int, init_method: str, config: Config) -> dict[str, str]:
    """The dtype of each tensor that this rank publishes, as its bucket says and as the tensor is."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    dtypes = {}
    for bucket in worker.push_buckets(1, KeepingTransport()):
        for meta, tensor in zip(bucket.tensors, bucket.handle, strict=True) if bucket is not None else ():
            assert tensor.dtype == meta.torch_dtype
            dtypes[meta.name] = meta.dtype
    worker.close()
    return dtypes


def pushed_tensors(rank: int, init_method: str, config: Config) -> Packed:
    """The tensors that this rank publishes, by name."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    pushed: Tensors = {}
    for bucket in worker.push_buckets(1, KeepingTransport()):
        if bucket is not None:
            pushed |= zip((meta.name for meta in bucket.tensors), bucket.handle, strict=True)
    worker.close()
    return packed_for_ray(pushed)


def held_bytes(rank: int, init_method: str, config: Config) -> dict[str, int]:
    """The bytes of a rank's weights (routers' biases among them) and gradients, and how many its optimizer updates."""
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    biases = [bias for name, bias in worker.model.named_buffers() if name.endswith("expert_bias")]
    weights = [*worker.model.parameters(), *biases]
    updated = sum(each.numel() for group in worker.optimizer.param_groups for each in group["params"])
    gradients = sum(parameter.main_grad.nbytes for parameter in worker.model.parameters())
    worker.close()
    return {"weights": sum(each.nbytes for each in weights), "gradients": gradients, "updated": updated}
