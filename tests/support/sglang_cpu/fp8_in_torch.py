"""Lets SGLang 0.5.21 compute with weights in fp8 on a CPU without AMX, where it has no kernel for them.

Products are those of the numbers that codes and scales stand for, with activations as they are. What loads codes and
scales is SGLang's own, and it holds them as on Ada and Hopper.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization import fp8
from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant
from sglang.srt.models.deepseek_common import deepseek_weight_loader


def linear(method, layer, x, bias=None):
    return F.linear(x, numbers(layer.weight, layer.weight_scale_inv, method, x.dtype), bias)


def experts(method, layer, dispatch_output):
    x = dispatch_output.hidden_states
    of_numbers = SimpleNamespace(
        num_experts=layer.num_experts,
        w13_weight=numbers(layer.w13_weight, layer.w13_weight_scale_inv, method, x.dtype),
        w2_weight=numbers(layer.w2_weight, layer.w2_weight_scale_inv, method, x.dtype),
    )
    return StandardCombineInput(
        moe_forward_native(of_numbers, x, dispatch_output.topk_output, method.moe_runner_config)
    )


def numbers(codes, scales, method, dtype):
    return block_quant_dequant(codes, scales, method.quant_config.weight_block_size, dtype)


def activate() -> None:
    for method, apply in ((fp8.Fp8LinearMethod, linear), (fp8.Fp8MoEMethod, experts)):
        method.apply = apply
        method.process_weights_after_loading = lambda self, layer: None  # nothing is laid out anew
    fp8.Fp8Config.get_supported_act_dtypes = classmethod(lambda cls: [torch.bfloat16, torch.half, torch.float32])
    # As on a GPU, latent attention's own products are of numbers; there they are rounded to bfloat16.
    deepseek_weight_loader._is_cuda = True
    deepseek_weight_loader.block_quant_dequant = lambda codes, scales, block, dtype: block_quant_dequant(
        codes, scales, block, torch.float32
    )
