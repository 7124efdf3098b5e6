"""Passes as graphs give the tokens of passes operator by operator, and read nothing while they are captured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet, ref

import pytest
import torch

from rollout.embedded.core import GenerationCore
from rollout.embedded.cuda.device_pass import Bucket, KvTable, lineage_words, packed, words_of
from rollout.embedded.cuda.graphed_target import MOST_TOKENS, bucket_of
from rollout.embedded.cuda.graphs import Captured, Graphs
from rollout.embedded.kv_cache import KvStore, Move
from rollout.embedded.model import Memory
from rollout.embedded.plan import RowSpan, sees
from rollout.embedded.verification import make_device_verifier
from slime_spec.config.tree import Config
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.draft_formats import make_format
from tests.support.embedded_harness import Samples, engine_config, greedy, make_core, random_prompt, run
from tests.support.graphs_on_cpu import CpuCapturer, graphs_on_cpu
from tests.support.stand_in_device import stand_in_device
from tests.support.tiny_models import make_tiny_checkpoint

pytestmark = pytest.mark.proves("rollout.embedded.drafters")
EOS = frozenset({2})
DRAWN = SamplingParams(max_new_tokens=9, temperature=0.8)
REQUESTS = [
    GroupRequest(str(i), random_prompt(4 + i, seed=i), (0, 1)[: 1 + i % 2], DRAWN if i == 3 else greedy(9))
    for i in range(4)
]


def outcome(samples: Samples) -> Mapping[tuple[str, int], Any]:
    return {key: (each.token_ids, each.spec) for key, each in samples.items()}


def operators_move_slots(store: KvStore, moves: Sequence[Move], move: Callable[..., None] = KvStore.move_slots) -> None:
    store.kernels = None
    move(store, moves)


def scaled(folder: Path) -> GenerationCore:
    """A core with other weights."""
    core = make_core(engine_config(folder))
    for tensor in core.decoder.tensors():
        tensor.mul_(1.25)
    return core


@pytest.mark.parametrize("algorithm", ["NONE", "LOOKUP", "HISTORY", "NGRAM"])
def test_a_target_of_graphs_gives_the_tokens_of_operators(tiny_llama: Path, algorithm: str) -> None:
    config = engine_config(tiny_llama, algorithm)
    expected = run(make_core(config), REQUESTS)
    with graphs_on_cpu() as capturer:
        assert outcome(run(make_core(config), REQUESTS)) == outcome(expected)
    assert capturer.num_replays > capturer.num_captured > 0


@pytest.mark.parametrize("rejection", [False, True], ids=["walk", "rejection"])
@pytest.mark.parametrize("name", ["eagle3", "eagle", "mimo"])
def test_chains_of_graphs_give_the_tokens_of_operators(tmp_path: Path, name: str, rejection: bool) -> None:
    config = make_format(tmp_path, name).config(3, 1, 4, engine={"max_running_requests": 16})
    config = replace(config, speculative=replace(config.speculative, use_rejection_sampling=rejection))
    expected = run(make_core(config), REQUESTS)
    with graphs_on_cpu() as capturer:
        assert outcome(run(make_core(config), REQUESTS)) == outcome(expected)
    assert capturer.num_replays > capturer.num_captured > 0


@pytest.mark.parametrize(
    ("name", "shape"),
    [("eagle3", (3, 4, 8)), ("eagle3", (2, 5, 20)), ("eagle", (3, 4, 8)), ("mimo", (3, 2, 6))],
    ids=str,
)
def test_trees_of_graphs_give_the_tokens_of_operators(tmp_path: Path, name: str, shape: tuple[int, int, int]) -> None:
    config = make_format(tmp_path, name).config(*shape, engine={"max_running_requests": 16})
    expected = run(make_core(config), REQUESTS)
    with graphs_on_cpu() as capturer:
        assert outcome(run(make_core(config), REQUESTS)) == outcome(expected)
    assert capturer.num_replays > capturer.num_captured > 0


def drafting(folder: Path, case: str) -> Config:
    """A tiny target and draft as a case of ON_DEVICE wants them."""
    name, (num_steps, topk, num_draft_tokens), settings = ON_DEVICE[case]
    if name != "standalone":
        config = make_format(folder, name).config(num_steps, topk, num_draft_tokens)
    else:
        draft = make_tiny_checkpoint(folder / "draft", num_hidden_layers=1)
        config = engine_config(make_tiny_checkpoint(folder / "target"), "STANDALONE", num_draft_tokens)
        settings = {**settings, "draft_model_path": str(draft), "num_steps": num_steps, "eagle_topk": topk}
    return replace(config, speculative=replace(config.speculative, **settings))


ON_DEVICE: Mapping[str, tuple[str, tuple[int, int, int], Mapping[str, Any]]] = {
    "eagle3 chain": ("eagle3", (3, 1, 4), {}),
    "eagle3 chain, rejection": ("eagle3", (3, 1, 4), {"use_rejection_sampling": True}),
    "mimo chain, block": ("mimo", (3, 1, 4), {"use_block_verification": True}),
    "eagle3 tree": ("eagle3", (3, 4, 8), {}),
    "eagle tree of two words a token": ("eagle", (4, 3, 40), {}),
    "a whole model's chain, rejection": ("standalone", (3, 1, 4), {"use_rejection_sampling": True}),
    "a whole model's tree": ("standalone", (3, 3, 8), {}),
}


@pytest.mark.parametrize("case", ON_DEVICE)
def test_drafts_that_stay_on_the_device_give_the_tokens_of_drafts_that_are_read(tmp_path: Path, case: str) -> None:
    config = drafting(tmp_path, case)
    requests = [
        *REQUESTS[1:],
        GroupRequest("plain", random_prompt(5, seed=8), (3,), replace(DRAWN, speculative=False)),
        GroupRequest("penalties", random_prompt(5, seed=9), (4,), replace(DRAWN, repetition_penalty=1.3)),
        GroupRequest("filtered", random_prompt(7, seed=7), (6, 7), replace(DRAWN, max_new_tokens=14, top_p=0.9)),
    ]
    expected = run(make_core(config), requests)
    with graphs_on_cpu():
        core = make_core(config, verifier=make_device_verifier(config.speculative, EOS))
        assert core.target.takes_unread
        assert outcome(run(core, requests)) == outcome(expected)


@pytest.mark.parametrize("case", ON_DEVICE)
def test_a_round_of_graphs_waits_for_the_device_once(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tensors of the stand-in have no addresses for kernels.
    monkeypatch.setattr(KvTable, "refresh", lambda table: None)
    monkeypatch.setattr(KvStore, "move_slots", operators_move_slots)
    config = drafting(tmp_path, case)
    rollout = replace(config.rollout, num_gpus_per_engine=1)
    with stand_in_device() as device, graphs_on_cpu() as capturer:
        core = make_core(replace(config, rollout=rollout))
        for i, temperature in enumerate((0.0, 1.0, 1.0)):
            params = SamplingParams(max_new_tokens=40, temperature=temperature)
            core.add(GroupRequest(str(i), random_prompt(9, seed=i), (i,), params), lambda sample: None)
        core.step()
        for _ in range(2):
            device.forget()
            core.step()
            waits = [read for read in device.reads if read != "cuda.synchronize"]
            assert len(waits) == 1, waits
    assert capturer.num_replays > 0


def test_other_weights_are_taken_into_use_without_a_new_capture(tiny_llama: Path) -> None:
    with graphs_on_cpu() as capturer:
        core = make_core(engine_config(tiny_llama))
        before = run(core, REQUESTS)
        other, expected = scaled(tiny_llama).decoder, scaled(tiny_llama)
        addresses = [tensor.data_ptr() for tensor in core.decoder.tensors()]
        values, num_captured = [tensor.clone() for tensor in other.tensors()], capturer.num_captured
        old, old_values = core.decoder, [tensor.clone() for tensor in core.decoder.tensors()]
        core.use(other, version=1)
        after = run(core, REQUESTS)
        assert [tensor.data_ptr() for tensor in other.tensors()] == addresses
        assert all(map(torch.equal, other.tensors(), values))
        assert all(map(torch.equal, old.tensors(), old_values))
        assert capturer.num_captured == num_captured
        assert outcome(after) == outcome(run(expected, REQUESTS))
        assert outcome(after) != outcome(before)


def test_weights_that_serve_no_more_are_let_go_before_the_next_pass(tiny_llama: Path) -> None:
    """Room for keys and values is made first."""
    with graphs_on_cpu():
        core = make_core(engine_config(tiny_llama))
        run(core, REQUESTS)
        old = ref(core.decoder)
        core.use(scaled(tiny_llama).decoder, version=1)
        assert old() is None


def test_weights_that_moved_are_captured_anew(tiny_llama: Path) -> None:
    with graphs_on_cpu() as capturer:
        core = make_core(engine_config(tiny_llama))
        before = run(core, REQUESTS)
        num_captured = capturer.num_captured
        core.move(torch.device("cpu"))
        assert outcome(run(core, REQUESTS)) == outcome(before)
    assert capturer.num_captured == 2 * num_captured


def test_an_engine_that_leaves_its_device_keeps_no_graph(tiny_llama: Path) -> None:
    with graphs_on_cpu() as capturer:
        core = make_core(engine_config(tiny_llama))
        run(core, REQUESTS)
        assert len(capturer.alive) > 0
        core.move(torch.device("cpu"))
        assert len(capturer.alive) == 0


def test_a_graph_is_captured_once_for_the_same_owners() -> None:
    calls: list[str] = []

    class Recorder:
        def capture(self, run: Callable[[], Any]) -> Captured:
            outputs = run()
            return Captured(lambda: calls.append(f"replay {outputs}"), outputs)

    graphs, first, second = Graphs(Recorder()), Memory(), Memory()
    for owner, name in ((first, "a"), (first, "b"), (second, "c"), (second, "d")):
        graphs.run("key", (owner,), lambda name=name: calls.append(f"capture {name}") or name)
    assert calls == ["capture a", "replay a", "replay a", "capture c", "replay c", "replay c"]
    assert len(graphs) == 1


def test_graphs_of_owners_that_are_gone_are_dropped_before_the_next_is_captured() -> None:
    """A push makes a new draft network, and a batch of the size that a graph was captured for may not come again."""
    alive: WeakSet[Captured] = WeakSet()
    found: list[int] = []

    class Recorder:
        def capture(self, run: Callable[[], Any]) -> Captured:
            found.append(len(alive))
            captured = Captured(lambda: None, run())
            alive.add(captured)
            return captured

    graphs, first = Graphs(Recorder()), Memory()
    graphs.run("a", (first,), lambda: None)
    graphs.run("b", (first,), lambda: None)
    del first
    graphs.run("a", (second := Memory(),), lambda: None)
    graphs.run("a", (second,), lambda: None)
    assert found == [0, 1, 0]


def test_a_read_of_the_device_is_refused_while_a_graph_is_captured() -> None:
    with pytest.raises(AssertionError, match="reads the device"):
        CpuCapturer().capture(lambda: torch.ones(2)[int(torch.ones(1))])


def test_buckets_hold_their_passes_and_end_where_there_is_much_to_compute() -> None:
    for rows, count in ((1, 1), (3, 4), (64, 8), (65, 9), (256, 8)):
        bucket = bucket_of([RowSpan(row, 0, count) for row in range(rows)])
        assert bucket is not None
        assert bucket.rows >= rows
        assert bucket.queries >= count
        assert bucket.tokens <= MOST_TOKENS
    assert bucket_of([RowSpan(0, 0, 33)]) is None
    assert bucket_of([RowSpan(row, 0, 1) for row in range(257)]) is None
    assert bucket_of([RowSpan(row, 0, 16) for row in range(200)]) is None


def test_a_lineage_has_a_bit_for_each_node_that_a_token_sees() -> None:
    span = RowSpan(0, 10, 40, parents=(*range(-1, 30), *(3,) * 9))
    words = lineage_words(span, words_of([span]))
    for token in range(span.count):
        bits = "".join(f"{int(word) & 0xFFFFFFFF:032b}"[::-1] for word in words[token])
        assert [bit == "1" for bit in bits[: len(span.parents or ())]] == [
            sees(span, token, span.tree_start + node) for node in range(len(span.parents or ()))
        ]


def test_what_goes_up_is_each_row_in_its_place() -> None:
    spans = [RowSpan(4, 7, 2), RowSpan(1, 3, 1, 2, 50)]
    buffer = packed(Bucket(3, 2), spans, [11, 12, 13]).tolist()
    assert buffer[:6] == [11, 12, 13, 0, 0, 0]
    assert buffer[6:12] == [7, 8, 53, 0, 0, 0]
    assert buffer[12:] == [4, 7, 2, 7, 0, 0, 0, 0, 1, 3, 1, 3, 2, 50, 0, 0, *[0] * 8]
