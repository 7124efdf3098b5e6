"""What a rank does in a test of losses and rates; each function runs in a process of its own, called by run_ranks."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from megatron.core import parallel_state as mpu
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from slime_spec.config.tree import Config
from slime_spec.types import TrainReport, TrainSample
from trainer_bridge.layout import Layout
from trainer_bridge.learning_rate import LearningRate
from trainer_bridge.megatron.model import hf_tensors
from trainer_bridge.megatron.process_groups import process_groups
from trainer_bridge.megatron.rank import TrainerRank
from trainer_bridge.megatron.vocab_parallel import token_logprobs


def gradients_of_steps(
    rank: int, init_method: str, config: Config, samples: Sequence[TrainSample], reference_scale: float
) -> tuple[TrainReport, list[dict[str, torch.Tensor]]]:
    """The report of a step, and each optimizer step's gradients under the names of this rank's weights.

    The reference's weights are the checkpoint's times ``reference_scale``, so that its KL is not 0.
    """
    worker = TrainerRank(config, rank, init_method)
    worker.load()
    if worker.reference is not None:
        for parameter in worker.reference.parameters():
            parameter.data.mul_(reference_scale)
    seen: list[dict[str, torch.Tensor]] = []
    update = worker._update

    def seen_update(loss: float) -> float:
        parameters = list(worker.model.parameters())
        values = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.data.copy_(parameter.main_grad)
        seen.append({name: tensor.clone() for name, tensor in hf_tensors(worker.model, worker.spec)})
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data.copy_(value)
        return update(loss)

    worker._update = seen_update
    report = worker.step(samples)
    worker.close()
    return report, seen


def megatron_rates(rank: int, init_method: str, rate: LearningRate, num_steps: int) -> list[float]:
    """The rates that Megatron's scheduler gives its steps, from step 0 on."""
    group: dict[str, float] = {}
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=0.0,
        max_lr=rate.largest,
        min_lr=rate.least,
        lr_warmup_steps=rate.num_warmup_steps,
        lr_decay_steps=rate.num_decay_steps,
        lr_decay_style=rate.style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
    )
    rates = []
    for _ in range(num_steps):
        rates.append(group["lr"])
        scheduler.step(1)
    return rates


def sliced_vocabulary(
    rank: int,
    init_method: str,
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    temperature: float,
    of_entropy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """This rank's view of logprobs and entropy, and its slice's gradient of their sums by these weights."""

    with process_groups(Layout(tensor=2, pipeline=1, data=1), rank, init_method, seed=0):
        mine = logits.chunk(2, dim=1)[rank].clone().requires_grad_()
        group = mpu.get_tensor_model_parallel_group()
        logprobs, entropy = token_logprobs(mine, targets, temperature, group, of_entropy is not None)
        total = (logprobs * weights).sum()
        (total if of_entropy is None else total + (entropy * of_entropy).sum()).backward()
        return logprobs.detach(), entropy.detach(), mine.grad
