"""The GPU's kernels against torch's operators, run by Triton's interpreter on a CPU and compiled on a GPU."""

from collections.abc import Sequence

import pytest
import torch

from rollout.embedded.linear import Packing
from rollout.embedded.plan import RowSpan
from tests.embedded.test_kernels import PASSES
from tests.support.random_blocks import RandomBlocks, RandomCache, block_spec, inputs

pytest.importorskip("triton")
from rollout.embedded.cuda.device_pass import Bucket, DevicePass, KvTable, words_of
from rollout.embedded.cuda.fused_blocks import FusedBlocks

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def both(shape: tuple[int, int, int], spans: Sequence[RowSpan], dtype: torch.dtype, normed: bool = False):
    spec = block_spec(*shape)
    blocks = RandomBlocks.make(spec, dtype, biased=True, normed=normed)
    stack = blocks.stack(dtype, Packing.PLAIN)
    x = inputs(spec, spans, dtype)
    cache = RandomCache(spec, dtype)
    plan = cache.plan(spans, dtype)
    expected = stack.run(x, plan, capture=(0, 1))
    fresh = cache.plan(spans, dtype)
    prefixes = cache.plan([RowSpan(0, 0, 1, 0, 1)], dtype).prefixes
    queries = max(span.count for span in spans)
    bucket = Bucket(len(spans) + 1, queries, words_of(spans))
    one_pass = DevicePass(bucket, KvTable(fresh.store, prefixes, CPU), CPU)
    one_pass.fill(spans, [0] * len(x))
    keep = torch.cat([index * queries + torch.arange(span.count) for index, span in enumerate(spans)])
    padded = torch.full((bucket.tokens, spec.hidden_size), 3.0, dtype=dtype)
    padded[keep] = x
    hidden, captured = FusedBlocks(spec, stack._rope, stack.layers).run(padded, one_pass, (0, 1), None)
    ours = hidden[keep], [each[keep] for each in captured]
    return expected, ours, plan.store, fresh.store


@pytest.mark.parametrize("dtype", TOLERANCE, ids=("fp32", "bf16"))
@pytest.mark.parametrize("name", PASSES)
def test_fused_blocks_equal_torchs_operators(name: str, dtype: torch.dtype) -> None:
    (hidden, captured), ours, store, own = both((9, 3, 64), PASSES[name], dtype)
    for want, got in zip((hidden, *captured), (ours[0], *ours[1]), strict=True):
        assert torch.allclose(want.float(), got.float(), rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
    for want, got in zip((*store.keys, *store.values), (*own.keys, *own.values), strict=True):
        assert torch.allclose(want.float(), got.float(), rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
