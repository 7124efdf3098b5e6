"""What stands in for a GPU refuses what a GPU refuses and counts what makes the host wait; the engine runs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import torch

from slime_spec.config.tree import Config
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.draft_formats import make_format
from tests.support.embedded_harness import engine_config, make_core, random_prompt, run
from tests.support.stand_in_device import DeviceTensor, StandIn, stand_in_device

pytestmark = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this build of torch has a device of its own")


@pytest.fixture
def device() -> Iterator[StandIn]:
    with stand_in_device() as device:
        yield device


def on_device(*numbers: float) -> torch.Tensor:
    made = torch.tensor(numbers, device="cuda")
    assert isinstance(made, DeviceTensor)
    assert made.is_cuda
    return made


MIXED: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "addition": lambda here, there: there + here,
    "concatenation": lambda here, there: torch.cat([here, there]),
    "index_select by the host's index": lambda here, there: there.index_select(0, here.long()),
    "a host's tensor by the device's index": lambda here, there: here[there.long()],
    "linear": lambda here, there: torch.nn.functional.linear(here, there.unsqueeze(0)),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("inference", [True, False])
def test_operands_of_both_devices_are_refused(device: StandIn, name: str, inference: bool) -> None:
    with torch.inference_mode(inference), pytest.raises(RuntimeError, match="found at least two devices"):
        MIXED[name](torch.zeros(2), on_device(1.0, 2.0))


def test_what_a_gpu_takes_from_the_host_is_taken(device: StandIn) -> None:
    there = on_device(1.0, 2.0, 3.0)
    there[torch.tensor([0, 1])] = 5.0
    there[2] = torch.tensor(7.0)
    assert (there * torch.tensor(2.0)).tolist() == [10.0, 10.0, 14.0]
    with pytest.raises(TypeError, match="to numpy"):
        there.numpy()


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.to("cpu"),
    "copy to the host": lambda x: torch.zeros(3).copy_(x),
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool((x > 1).all()),
    "a condition": lambda x: 1 if x[0] > 1 else 2,
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 1],
    "equal": lambda x: torch.equal(x, x.clone()),
    "where": lambda x: torch.where(x > 1),
    "repeats": lambda x: x.repeat_interleave(x.long()),
    "synchronize": lambda x: torch.cuda.synchronize(),
}
WAITS_FOR_NOTHING: dict[str, Callable[[torch.Tensor], object]] = {
    "arithmetic": lambda x: (x * 2).softmax(-1).cumsum(0),
    "a view": lambda x: x.view(3, 1)[1:].unsqueeze(0),
    "a fill by mask": lambda x: x.masked_fill(x > 1, 0.0),
    "an assignment by mask": lambda x: x.clone().__setitem__(x > 1, 0.0),
    "topk": lambda x: x.topk(2),
    "a copy on the device": lambda x: torch.zeros_like(x).copy_(x),
    "repeats of known number": lambda x: x.repeat_interleave(2),
}


@pytest.mark.parametrize("name", [*READS, *WAITS_FOR_NOTHING])
@pytest.mark.parametrize("inference", [True, False])
def test_what_makes_the_host_wait_is_one_read(device: StandIn, name: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        x = on_device(1.0, 2.0, 3.0)
        device.forget()
        (READS | WAITS_FOR_NOTHING)[name](x)
    assert len(device.reads) == (name in READS), device.reads
    assert device.uploads == []


def test_what_goes_to_the_device_is_an_upload(device: StandIn) -> None:
    x = on_device(1.0, 2.0)
    assert device.uploads == ["copy_"]
    x[torch.tensor([0])]
    torch.zeros(3).to("cuda")
    torch.arange(3, device="cuda")
    assert len(device.uploads) == 3


def test_views_share_memory_and_other_threads_have_the_device_too(device: StandIn) -> None:
    kept: list[torch.Tensor] = []
    thread = Thread(target=lambda: kept.append(torch.zeros(2, 3, device="cuda")))
    thread.start()
    thread.join()
    with torch.inference_mode():
        kept[0][:, 1:] += 2
        kept[0].view(-1)[0] = 1
    assert kept[0].tolist() == [[1, 2, 2], [0, 2, 2]]


def test_without_it_there_is_no_device() -> None:
    with stand_in_device():
        pass
    assert not torch.cuda.is_available()


@pytest.mark.parametrize("name", ["lookup", "eagle3 chain", "eagle3 tree"])
def test_an_engine_on_it_emits_what_the_cpus_engine_emits(
    device: StandIn, tiny_llama: Path, tmp_path: Path, name: str
) -> None:
    shape = (3, 3, 8) if name == "eagle3 tree" else (3, 1, 4)
    config = engine_config(tiny_llama, "LOOKUP") if name == "lookup" else make_format(tmp_path, "eagle3").config(*shape)
    requests = [
        GroupRequest(str(i), random_prompt(9, seed=i), (i, i + 9), SamplingParams(max_new_tokens=12, temperature=t))
        for i, t in enumerate((0.0, 1.0))
    ]

    def emitted(config: Config) -> dict[tuple[str, int], tuple[int, ...]]:
        return {key: sample.token_ids for key, sample in run(make_core(config), requests).items()}

    on_gpu = replace(config, rollout=replace(config.rollout, num_gpus_per_engine=1))
    expected = emitted(config)
    device.forget()
    assert emitted(on_gpu) == expected
    assert device.uploads


DRAFTS: dict[str, dict[str, object]] = {
    "eagle3": {},
    "eagle": {},
    "eagle with hot tokens": {"token_map": "hot.pt"},
    "mimo": {},
    "eagle3 of int8": {"draft_model_quantization": "int8"},
    "eagle3 of fp8": {"draft_model_quantization": "fp8"},
}


@pytest.mark.parametrize("name", DRAFTS)
def test_an_engine_that_leaves_the_device_takes_its_draft_along(device: StandIn, tmp_path: Path, name: str) -> None:
    settings = dict(DRAFTS[name])
    if "token_map" in settings:
        torch.save(list(range(0, 131, 2)), tmp_path / "hot.pt")
        settings["token_map"] = str(tmp_path / "hot.pt")
    config = make_format(tmp_path, name.split()[0]).config(3, 1, 4, **settings)
    core = make_core(replace(config, rollout=replace(config.rollout, num_gpus_per_engine=1)))
    requests = [GroupRequest("a", random_prompt(9, seed=1), (1, 2), SamplingParams(max_new_tokens=12))]
    home, weights = core.decoder.device, core.drafter.weights
    assert weights is not None
    before = run(core, requests)
    assert {tensor.device.type for tensor in weights.tensors().values()} == {"cuda"}
    core.move(torch.device("cpu"))
    assert {tensor.device.type for tensor in weights.tensors().values()} == {"cpu"}
    core.move(home)
    after = run(core, requests)
    assert [(each.token_ids, each.spec) for each in after.values()] == [
        (each.token_ids, each.spec) for each in before.values()
    ]


ROUNDS = {
    "lookup": ((), {}, ["verify"]),
    "eagle3 chain": ((3, 1, 4), {}, ["draft", "verify"]),
    "eagle3 by rejection": ((3, 1, 4), {"use_rejection_sampling": True}, ["draft", "verify"]),
    "eagle3 tree": ((3, 3, 8), {}, ["lineages", "draft", "verify"]),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_a_round_waits_once_for_the_drafts_and_once_for_the_tokens(
    device: StandIn, tiny_llama: Path, tmp_path: Path, name: str
) -> None:
    """And a tree once for each level's parents, which the next level's mask needs; clocks that wait do not count."""
    shape, settings, expected = ROUNDS[name]
    config = make_format(tmp_path, "eagle3").config(*shape) if shape else engine_config(tiny_llama, "LOOKUP")
    speculative = replace(config.speculative, **settings)
    core = make_core(replace(config, speculative=speculative, rollout=replace(config.rollout, num_gpus_per_engine=1)))
    for i, temperature in enumerate((0.0, 1.0, 1.0)):
        params = SamplingParams(max_new_tokens=40, temperature=temperature)
        core.add(GroupRequest(str(i), random_prompt(9, seed=i), (i,), params), lambda sample: None)
    core.step()
    for _ in range(5):
        device.forget()
        core.step()
        assert len([read for read in device.reads if read != "cuda.synchronize"]) == len(expected)
