"""What a rank does in a test of losses and rates; each function runs in a process of its own, called by run_ranks."""

import torch
from megatron.core import parallel_state as mpu

from trainer_bridge.layout import Layout
from trainer_bridge.megatron.process_groups import process_groups
from trainer_bridge.megatron.vocab_parallel import token_logprobs


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
