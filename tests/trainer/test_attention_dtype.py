"""A CPU attends to bfloat16 in float32: values and gradients are exact ones, rounded once. A GPU does as it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from trainer_bridge.megatron.attention import Attend, attend, attend_segments, attention_dtype
from trainer_bridge.microbatch import SegmentSpan

HEADS, KV_HEADS, DIM = 6, 2, 16
# Three responses, one of them fed nothing, share a prompt of 9 tokens; a prompt of 5 has one response of its own.
SPANS = (SegmentSpan(0, 9, (12, 0, 30)), SegmentSpan(51, 5, (20,)))
NUM_TOKENS = 76
HALF_A_STEP = 2.0**-8  # between numbers of 8 significant bits, over the smaller of them
FLOAT32_ERROR = 1e-6


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output, whose numbers bfloat16 has."""
    generator = torch.Generator().manual_seed(3)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(1, each, NUM_TOKENS, DIM, generator=generator).bfloat16().to(dtype) for each in heads]


def visible() -> torch.Tensor:
    """Which positions [T] each position [T] sees, by the definition: its prompt and its response, up to itself."""
    owners = [(0, 0)] * 9 + [(0, 1)] * 12 + [(0, 3)] * 30 + [(1, 0)] * 5 + [(1, 1)] * 20
    sees = torch.zeros(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool)
    for i, (segment, response) in enumerate(owners):
        for j in range(i + 1):
            sees[i, j] = owners[j] in {(segment, 0), (segment, response)}
    return sees


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: tuple[SegmentSpan, ...]) -> torch.Tensor:
    """Attention by its formula, each key-value head repeated for the heads that share it."""
    assert spans == SPANS
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) / DIM**0.5).masked_fill(~visible(), float("-inf"))
    return scores.softmax(-1) @ v


def computed(attention: Attend, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output, and the gradients of query, key and value."""
    *qkv, gradient = inputs(dtype)
    leaves = [each.requires_grad_() for each in qkv]
    output = attention(*leaves, SPANS)
    output.backward(gradient)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def test_bfloat16_on_a_cpu_gives_values_and_gradients_that_are_rounded_once() -> None:
    got, expected = computed(attend, torch.bfloat16), computed(exact, torch.float64)
    assert len(got) == len(expected) == 4
    for rounded, number in zip(got, expected, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert number.abs().max() > 0.1
        torch.testing.assert_close(rounded.double(), number, rtol=HALF_A_STEP, atol=FLOAT32_ERROR)


def test_attention_in_bfloat16_itself_would_be_further_off() -> None:
    expected = computed(exact, torch.float64)

    def error(attention: Attend) -> list[float]:
        got = computed(attention, torch.bfloat16)
        return [float((a.double() - b).abs().max()) for a, b in zip(got, expected, strict=True)]

    assert all(ours < plain for ours, plain in zip(error(attend), error(attend_segments), strict=True))


def test_float32_on_a_cpu_is_computed_as_ever() -> None:
    for got, expected in zip(computed(attend, torch.float32), computed(attend_segments, torch.float32), strict=True):
        assert torch.equal(got, expected)


class Seen(TorchFunctionMode):
    """Notes the dtypes in which attention is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.dtypes |= {each.dtype for each in args[:3]}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("device", "dtype", "computes_in"),
    [
        ("meta", torch.bfloat16, torch.bfloat16),
        ("cpu", torch.bfloat16, torch.float32),
        ("cpu", torch.float32, torch.float32),
    ],
)
def test_only_a_cpu_computes_bfloat16_in_another_dtype(
    device: str, dtype: torch.dtype, computes_in: torch.dtype
) -> None:
    """A device without numbers stands for a GPU."""
    with Seen() as seen:
        q, k, v = (torch.empty(1, heads, 25, DIM, dtype=dtype, device=device) for heads in (HEADS, KV_HEADS, KV_HEADS))
        output = attend(q, k, v, (SegmentSpan(0, 5, (20,)),))
    assert seen.dtypes == {computes_in}
    assert (output.dtype, output.device.type, output.shape) == (dtype, device, (1, HEADS, 25, DIM))


def test_a_gpu_computes_in_the_dtype_that_it_is_given() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert attention_dtype(torch.device("cuda"), dtype) == dtype
