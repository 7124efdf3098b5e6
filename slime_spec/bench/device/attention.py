"""Measure attention over live keys and values: the engine's kernel against what torch has for the same.

    ours         the engine's kernel over the engine's store
    contiguous   SDPA over the same store, whose rows are contiguous
    gathered     SDPA over the blocks of a pool, which are gathered first
    flex         FlexAttention, compiled, over the same blocks, which a block mask finds

A case is some tokens of each of some sequences at a context; more than one token form a tree. Every way attends from
all sequences that are there, a case's number at a time, so that no keys lie in a cache because they were read before;
on a GPU these calls are one captured graph, as in a pass. Masks and block masks are made once, as a pass makes them for
all layers.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product

import torch
import torch.nn.functional as F

from rollout.embedded.cuda.graphs import CudaCapturer
from rollout.embedded.kv_cache import KvStore
from rollout.embedded.plan import RowSpan, tree_shape
from slime_spec.bench.device.random_model import LLAMA_31_8B, TINY
from slime_spec.bench.local_engine import device_of
from slime_spec.bench.rows import BenchOptions, Row, at_least, at_most, left_out_rows
from slime_spec.bench.timing import Budget, interleaved, median_s
from slime_spec.checkpoints.model_spec import ModelSpec

REACH = 1.15
PAGE = 128  # slots of a block: FlexAttention's own size
OURS = "ours"
NO_TRITON = "not measured: the engine's kernel needs Triton, which is not installed"
# Largest error over the largest value: of a few roundings of the dtype.
AGREEMENT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Way = Callable[[int], torch.Tensor]  # attention [rows * tokens, heads * head_dim] of the rows of a window


@dataclass(frozen=True)
class Case:
    """Names what a pass attends from: ``tokens`` of each of ``rows`` sequences, after ``context`` others."""

    context: int
    rows: int
    tokens: int

    def __str__(self) -> str:
        return f"c{self.context}.b{self.rows}.k{self.tokens}"

    @property
    def length(self) -> int:
        return self.context + self.tokens

    @property
    def parents(self) -> tuple[int, ...]:
        """Return the tree of the tokens, each with two children as far as they reach."""
        return tuple((node - 1) // 2 for node in range(self.tokens))


@dataclass(frozen=True)
class AttentionSizes:
    """Holds the cases' contexts, rows and tokens, the heads of ``spec``, and the timed rounds."""

    spec: ModelSpec
    dtype: torch.dtype
    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    num_rounds: int
    seconds: float | None = None

    @property
    def cases(self) -> list[Case]:
        return [Case(*sizes) for sizes in product(self.contexts, self.rows, self.tokens)]

    @property
    def capacity(self) -> int:
        """Return the slots of a row: whole blocks for the longest case."""
        return math.ceil((max(self.contexts) + max(self.tokens)) / PAGE) * PAGE


def sizes_on(device: torch.device, num_rounds: int, seconds: float | None) -> AttentionSizes:
    """Return the heads of an 8B model in bf16 on a GPU, and a tiny model's in fp32 on a CPU."""
    if device.type == "cuda":
        spec, dtype = replace(LLAMA_31_8B, num_layers=1), torch.bfloat16
        return AttentionSizes(spec, dtype, (512, 2048, 8192), (1, 8, 64), (1, 4, 8), num_rounds, seconds)
    return AttentionSizes(replace(TINY, num_layers=1), torch.float32, (20, 130), (1, 2), (1, 4), 1, seconds)


def measure(options: BenchOptions) -> list[Row]:
    if importlib.util.find_spec("triton") is None:
        return [Row("device.attention", NO_TRITON, math.nan, "")]
    device = device_of(options.num_gpus)
    return measure_attention(device, sizes_on(device, options.num_rounds, options.seconds), options.seeds[0])


def measure_attention(device: torch.device, sizes: AttentionSizes, seed: int = 0) -> list[Row]:
    """Measure every case that there is time for: each way's time over the best one's, and whether all agree."""
    scene = Scene(sizes, device, seed)
    rows: list[Row] = []
    agree: dict[str, bool] = {}
    left_out: list[Case] = []
    for case in Budget(sizes.seconds).within(sizes.cases, left_out):
        measured, agreeing = _measure_case(scene, case)
        rows += measured
        agree |= {f"{case} {name}": does for name, does in agreeing.items()}
    differing = [name for name, does in agree.items() if not does]
    what = "of the ways of all cases, those that agree with fp32 computed by the definition"
    what += f"; not {', '.join(differing)}" if differing else ""
    share = 1.0 - len(differing) / len(agree) if agree else 0.0
    rows.append(at_least("device.attention.agree", what, share, "share", 1.0))
    return rows + left_out_rows("device.attention", list(map(str, left_out)))


class Scene:
    """Holds the keys and values of all sequences twice: in the engine's store, and in the blocks of a pool."""

    def __init__(self, sizes: AttentionSizes, device: torch.device, seed: int) -> None:
        self.sizes, self.spec, self.device = sizes, sizes.spec, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.num_rows, self.num_blocks = max(sizes.rows), sizes.capacity // PAGE
        self.stores = KvStore(self.spec, sizes.dtype, device), KvStore(self.spec, sizes.dtype, device)
        self.stores[0].resize(self.num_rows, sizes.capacity)
        for side in self.sides:
            side.normal_(generator=self.generator)
        pages = torch.randperm(self.num_rows * self.num_blocks, generator=self.generator, device=device)
        self.page_table = pages.view(self.num_rows, self.num_blocks)
        self.pools = [self._pool(side) for side in self.sides]

    @property
    def sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [rows, kv heads, capacity, head_dim]."""
        return self.stores[0].keys[0], self.stores[0].values[0]

    def _pool(self, side: torch.Tensor) -> torch.Tensor:
        """Return a side's blocks [kv heads, blocks, PAGE, head_dim] where the page table says."""
        blocks = side.unflatten(2, (self.num_blocks, PAGE)).transpose(0, 1).flatten(1, 2)
        pool = torch.empty_like(blocks, memory_format=torch.contiguous_format)
        pool[:, self.page_table.flatten()] = blocks
        return pool


class CaseScene:
    """Holds what the ways of one case read: its queries, and which of the last slots each sees."""

    def __init__(self, scene: Scene, case: Case) -> None:
        self.scene, self.case, self.spec = scene, case, scene.spec
        shape = case.rows * case.tokens, self.spec.num_heads, self.spec.head_dim
        dtype = scene.sizes.dtype
        self.query = torch.empty(shape, dtype=dtype, device=scene.device).normal_(generator=scene.generator)
        self.sees = torch.from_numpy(tree_shape(case.parents)[0]).to(scene.device)  # [tokens, tokens]
        self.windows = range(scene.num_rows // case.rows)
        self.num_pages = math.ceil(case.length / PAGE)

    def rows_of(self, window: int) -> slice:
        return slice(window * self.case.rows, (window + 1) * self.case.rows)

    @property
    def group(self) -> int:
        return self.spec.num_heads // self.spec.num_kv_heads

    @cached_property
    def visible(self) -> torch.Tensor:
        """Return which slots each token sees [tokens, length]."""
        context = self.sees.new_ones(self.case.tokens, self.case.context)
        return torch.cat([context, self.sees], dim=1)

    @cached_property
    def folded(self) -> torch.Tensor:
        """Return queries [rows, kv heads, group * tokens, head_dim]."""
        query = self.query.view(self.case.rows, self.case.tokens, self.spec.num_kv_heads, self.group, -1)
        return query.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def unfolded(self, out: torch.Tensor) -> torch.Tensor:
        """Return the attention of folded queries as a way returns it."""
        return out.unflatten(2, (self.group, self.case.tokens)).permute(0, 3, 1, 2, 4).reshape(len(self.query), -1)

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """Return what SDPA adds to the scores of folded queries; one token sees all.

        A line of the mask begins at a multiple of 16 bytes, as the quick kernels want it.
        """
        if self.case.tokens == 1:
            return None
        hidden = ~self.visible.repeat(self.group, 1)
        lines = torch.zeros(len(hidden), math.ceil(self.case.length / 8) * 8, device=hidden.device)
        return lines.to(self.query.dtype)[:, : self.case.length].masked_fill_(hidden, -math.inf)

    def by_definition(self, row: int) -> torch.Tensor:
        """Return the attention of a row of the first window in fp32 [tokens, heads * head_dim]."""
        tokens = slice(row * self.case.tokens, (row + 1) * self.case.tokens)
        query = self.query[tokens].float().unflatten(1, (self.spec.num_kv_heads, self.group))
        keys, values = (side[row, :, : self.case.length].float() for side in self.scene.sides)
        scores = torch.einsum("thgd,hsd->hgts", query, keys) * self.spec.head_dim**-0.5
        weights = scores.masked_fill(~self.visible, -math.inf).softmax(dim=-1)
        return torch.einsum("hgts,hsd->thgd", weights, values).flatten(1)


def ours(at: CaseScene) -> Way:
    from rollout.embedded.cuda import operators  # needs Triton
    from rollout.embedded.cuda.device_pass import DevicePass, KvTable, exact_bucket

    case, table = at.case, KvTable(*at.scene.stores, at.scene.device)
    passes = []
    for window in at.windows:
        parents = case.parents if case.tokens > 1 else None
        numbers = range(at.scene.num_rows)[at.rows_of(window)]
        spans = [RowSpan(row, case.context, case.tokens, parents=parents) for row in numbers]
        passes.append(DevicePass(exact_bucket(spans), table, at.scene.device))
        passes[-1].fill(spans, [0] * len(at.query))
    return lambda window: operators.attend(at.query, passes[window], 0, at.spec)


def contiguous(at: CaseScene) -> Way:
    def attend(window: int) -> torch.Tensor:
        keys, values = (side[at.rows_of(window), :, : at.case.length] for side in at.scene.sides)
        return at.unfolded(F.scaled_dot_product_attention(at.folded, keys, values, attn_mask=at.mask))

    return attend


def gathered(at: CaseScene) -> Way:
    def rows(pool: torch.Tensor, window: int) -> torch.Tensor:
        blocks = pool[:, at.scene.page_table[at.rows_of(window), : at.num_pages]]
        return blocks.flatten(2, 3)[:, :, : at.case.length].transpose(0, 1)

    def attend(window: int) -> torch.Tensor:
        keys, values = (rows(pool, window) for pool in at.scene.pools)
        return at.unfolded(F.scaled_dot_product_attention(at.folded, keys, values, attn_mask=at.mask))

    return attend


def flex(at: CaseScene) -> Way:
    """On a CPU the same calls are not compiled, which would take a minute."""
    from torch.nn.attention.flex_attention import flex_attention

    # What was compiled for other cases is not needed, and would count towards the limit of recompilations.
    torch._dynamo.reset()
    backend = "inductor" if at.scene.device.type == "cuda" else "eager"
    attention = torch.compile(flex_attention, backend=backend, dynamic=False)
    masks = [_block_mask(at, window) for window in at.windows]
    keys, values = (pool.flatten(1, 2).unsqueeze(0) for pool in at.scene.pools)
    query = at.query.view(at.case.rows, at.case.tokens, at.spec.num_heads, -1).transpose(1, 2).contiguous()

    def attend(window: int) -> torch.Tensor:
        out = attention(query, keys, values, block_mask=masks[window], enable_gqa=True)
        return out.transpose(1, 2).reshape(len(at.query), -1)

    return attend


def _block_mask(at: CaseScene, window: int) -> torch.nn.attention.flex_attention.BlockMask:
    """Return which pages each row reads: whole where all of its tokens see all of it, else slot by slot.

    All that differs between windows is in tensors, for a number would be compiled in.
    """
    from torch.nn.attention.flex_attention import BlockMask

    scene, case = at.scene, at.case
    table, whole = scene.page_table[at.rows_of(window)], case.context // PAGE
    pages = scene.page_table.numel()
    place, owner = torch.empty(2, pages, dtype=torch.int64, device=scene.device)  # of a page in its row, and that row
    numbers = torch.arange(pages, device=scene.device)
    place[scene.page_table.flatten()] = numbers % scene.num_blocks
    owner[scene.page_table.flatten()] = numbers // scene.num_blocks - window * case.rows
    context = torch.tensor(case.context, device=scene.device)
    sees = torch.zeros(case.tokens, 2 * PAGE, dtype=torch.bool, device=scene.device)
    sees[:, : case.tokens] = at.sees

    def visible(row: torch.Tensor, head: torch.Tensor, token: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        page = slot // PAGE
        node = place[page] * PAGE + slot % PAGE - context
        return (owner[page] == row) & ((node < 0) | sees[token, node.clamp(0, 2 * PAGE - 1)])

    def entries(listed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        indices = torch.zeros(case.rows, 1, 1, pages, dtype=torch.int32, device=scene.device)
        indices[:, 0, 0, : listed.shape[1]] = listed
        return torch.full((case.rows, 1, 1), listed.shape[1], dtype=torch.int32, device=scene.device), indices

    lengths = case.tokens, pages * PAGE
    lists = *entries(table[:, whole : at.num_pages]), *entries(table[:, :whole])
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=PAGE, mask_mod=visible, seq_lengths=lengths)


WAYS: Mapping[str, Callable[[CaseScene], Way]] = {
    OURS: ours,
    "contiguous": contiguous,
    "gathered": gathered,
    "flex": flex,
}


def _measure_case(scene: Scene, case: Case) -> tuple[list[Row], dict[str, bool]]:
    """Return a case's rows, and of each way that ran whether it agrees with the definition."""
    at = CaseScene(scene, case)
    expected = torch.cat([at.by_definition(row) for row in range(case.rows)])
    ways: dict[str, Way] = {}
    failures: dict[str, str] = {}
    agree: dict[str, bool] = {}
    for name, make in WAYS.items():
        try:
            way = make(at)
            error = (way(0).float() - expected).abs().max() / expected.abs().max()
        except RuntimeError as failure:  # of a compiler, or for want of memory: the other ways are measured
            failures[name] = (str(failure).splitlines() or [repr(failure)])[0]
            continue
        ways[name] = way
        agree[name] = bool(error < AGREEMENT[scene.sizes.dtype])
    return _rows(at, _times(at, ways), failures), agree


def _times(at: CaseScene, ways: Mapping[str, Way]) -> dict[str, float]:
    """Return the median seconds of a call of each way, all windows in turn."""

    def all_windows(way: Way) -> list[torch.Tensor]:
        return [way(window) for window in at.windows]

    runs: dict[str, Callable[[], object]] = {name: partial(all_windows, way) for name, way in ways.items()}
    if at.scene.device.type == "cuda":
        capturer = CudaCapturer()
        captured = {name: capturer.capture(run) for name, run in runs.items()}
        runs = {name: each.replay for name, each in captured.items()}
    sides = {name: partial(_in_turn, run) for name, run in runs.items()}
    times = interleaved(f"attention {at.case}", at.scene.sizes.num_rounds, sides)
    return {name: median_s(each) / len(at.windows) for name, each in times.items()}


def _in_turn(run: Callable[[], object], turn: int) -> object:
    return run()


def _rows(at: CaseScene, times: Mapping[str, float], failures: Mapping[str, str]) -> list[Row]:
    best = min(times, key=times.__getitem__)
    prefix, case = f"device.attention.{at.case}", at.case
    words = f"{case.tokens} tokens of each of {case.rows} sequences after {case.context}"
    rows = [Row(f"{prefix}.best", f"{words}: a layer's attention, by {best}", 1e6 * times[best], "us")]
    for name in WAYS:
        id, what = f"{prefix}.{name}.ratio", f"{words}: {name} over the best"
        if name in failures:
            rows.append(Row(id, f"{what}: {failures[name]}", math.nan, ""))
        elif name == OURS and at.scene.device.type == "cuda":
            rows.append(at_most(id, what, times[name] / times[best], "x", REACH))
        else:
            rows.append(Row(id, what, times[name] / times[best], "x"))
    return rows
