"""Engines draft in fp8, in graphs too, by the kernel or on a CPU by its reference; replies are the target's."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rollout.embedded import drafters
from rollout.embedded.core import GenerationCore
from rollout.embedded.cuda import fp8
from rollout.embedded.drafters.feature_drafter import FeatureDrafter
from rollout.embedded.drafters.fp8_blocks import from_fp8, to_fp8
from rollout.embedded.drafters.quantized import Fp8Linear
from slime_spec.config.speculation import check_fp8
from slime_spec.errors import ConfigError
from slime_spec.types import GroupRequest
from tests.support.draft_formats import TinyDraft, make_format
from tests.support.embedded_harness import Samples, greedy, make_core, random_prompt, run
from tests.support.fp8_on_cpu import fp8_on_cpu
from tests.support.graphs_on_cpu import graphs_on_cpu
from tests.support.tiny_drafts import random_tensors

PRODUCT = fp8.product
REQUESTS = [GroupRequest(str(i), random_prompt(3 + 4 * i, seed=i), (0,), greedy(7)) for i in range(3)]


@pytest.fixture(autouse=True)
def _fp8() -> Iterator[None]:
    with fp8_on_cpu():
        yield


def drafting_in_fp8(tiny: TinyDraft) -> GenerationCore:
    return make_core(tiny.config(3, draft_model_quantization="fp8", engine={"max_running_requests": 16}))


def replies(samples: Samples) -> dict[tuple[str, int], tuple[int, ...]]:
    return {key: each.token_ids for key, each in samples.items()}


def rounds(samples: Samples) -> dict[tuple[str, int], object]:
    return {key: each.spec for key, each in samples.items()}


@pytest.mark.parametrize("name", ["eagle3", "eagle", "mimo"])
def test_greedy_replies_with_a_draft_in_fp8_are_the_targets_in_graphs_too(tmp_path: Path, name: str) -> None:
    tiny = make_format(tmp_path, name)
    core = drafting_in_fp8(tiny)
    assert isinstance(core.drafter, FeatureDrafter)
    by_operators = run(core, REQUESTS)
    with graphs_on_cpu() as capturer:
        by_graphs = run(drafting_in_fp8(tiny), REQUESTS)
    assert capturer.num_replays > capturer.num_captured > 0
    assert replies(by_graphs) == replies(by_operators) == replies(run(make_core(tiny.plain), REQUESTS))
    assert rounds(by_graphs) == rounds(by_operators)
    assert all(each.spec.num_rounds > 0 for each in by_graphs.values())
    network = core.drafter.weights.network
    matrices = [
        network.fc,
        network.head,
        *(getattr(network.layers[0], each) for each in ("qkv", "out", "gate_up", "down")),
    ]
    assert {type(each) for each in matrices if each is not None} == {Fp8Linear}


def test_the_kernel_itself_drafts_what_its_reference_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, request = make_format(tmp_path, "eagle"), replace(REQUESTS[0], params=greedy(3))
    expected = run(drafting_in_fp8(tiny), [request])
    monkeypatch.setattr(fp8, "product", PRODUCT)
    with graphs_on_cpu():
        assert rounds(run(drafting_in_fp8(tiny), [request])) == rounds(expected)


def test_a_pushed_draft_is_rounded_at_the_engine_and_drafts_in_graphs_of_its_own(tmp_path: Path) -> None:
    tiny = make_format(tmp_path, "eagle3")
    with graphs_on_cpu() as capturer:
        core = drafting_in_fp8(tiny)
        before = run(core, REQUESTS)
        num_captured = capturer.num_captured
        weights = core.drafter.weights
        assert weights is not None
        pushed = random_tensors(dict(weights.shapes), seed=9)
        weights.build({name: tensor.clone() for name, tensor in pushed.items()})()
        assert not weights.exact
        after = run(core, REQUESTS)
    assert replies(after) == replies(before)
    assert capturer.num_captured > num_captured
    # Of q, k and v, which are one matrix, blocks are shared; alone is what is no part of another.
    alone = {name for name, tensor in pushed.items() if tensor.ndim == 2 and name.split(".")[-2] in ("fc", "down_proj")}
    assert alone
    for name, tensor in weights.tensors().items():
        expected = from_fp8(*to_fp8(pushed[name])) if name in alone else pushed[name]
        assert torch.equal(tensor, expected) if tensor.ndim == 1 or name in alone else not torch.equal(tensor, expected)


def test_an_engine_on_an_older_gpu_refuses_the_draft_before_it_reads_a_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_format(tmp_path, "eagle3")
    (tiny.target / "model.safetensors").unlink()
    monkeypatch.setattr(drafters, "check_fp8", check_fp8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"compute capability 8\.9"):
        drafting_in_fp8(tiny)
