"""The native kernels against torch's operators, and what they promise beyond them: a token's result is its own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rollout.embedded.kernels.build import FLAGS, MAIN, NATIVE, BuildError, build_library
from rollout.embedded.kernels.library import MODE_VARIABLE, Kernels, kernels
from rollout.embedded.kv_cache import KvStore
from rollout.embedded.linear import PackedLinear, Packing
from rollout.embedded.plan import RowSpan
from rollout.embedded.rope import RopeTable
from rollout.embedded.verification.race import race_in_numpy
from rollout.embedded.weights import DecoderBuilder, named_tensors
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.errors import ConfigError
from slime_spec.types import GroupRequest
from tests.support.embedded_harness import ReplayDrafter, engine_config, greedy, make_core, random_prompt, run
from tests.support.random_blocks import RandomBlocks, RandomCache, block_spec, inputs
from tests.support.tiny_models import make_tiny_checkpoint

DTYPES = (torch.float32, torch.bfloat16)
FORK = (-1, 0, 0, 1, 1, 2, 5)
PASSES = {
    "one token": [RowSpan(0, 37, 1)],
    "a batch": [RowSpan(0, 5, 1), RowSpan(1, 60, 1), RowSpan(2, 0, 1), RowSpan(3, 130, 1)],
    "ragged": [RowSpan(1, 5, 4), RowSpan(2, 61, 1), RowSpan(3, 0, 17), RowSpan(4, 33, 9)],
    "trees": [RowSpan(0, 20, 7, parents=FORK), RowSpan(1, 3, 3), RowSpan(2, 9, 3, parents=(-1, 0, 0))],
    "a tree's third level": [RowSpan(0, 23, 3, parents=FORK[:6])],
    "shared prefixes": [
        RowSpan(0, 7, 1, 0, 50),
        RowSpan(1, 0, 4, 1, 1),
        RowSpan(2, 19, 2),
        RowSpan(3, 8, 7, 0, 50, FORK),
    ],
    "a long prompt": [RowSpan(2, 0, 300)],
    "a prompt's second piece": [RowSpan(0, 41, 290)],
}
SHAPES = [(9, 3, 64), (6, 2, 16), (4, 4, 8), (5, 1, 10), (7, 1, 36), (8, 4, 80), (16, 8, 128)]


OTHER_MACHINES = {
    "AVX2": ("-march=haswell", "-O1"),
    "SSE": ("-march=x86-64", "-O1"),
}  # -O1: compiled for the test alone


@pytest.fixture(scope="module")
def library() -> Kernels:
    """The kernels for this machine."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    built = kernels()
    assert built is not None, "a machine with a C compiler builds the kernels"
    return built


@pytest.fixture(scope="module", params=OTHER_MACHINES.values(), ids=OTHER_MACHINES)
def other_library(
    request: pytest.FixtureRequest, library: Kernels, tmp_path_factory: pytest.TempPathFactory
) -> Kernels:
    """The kernels for a smaller machine that this one can imitate."""
    if os.uname().machine != "x86_64":
        pytest.skip("flags of x86")
    return Kernels(build_library(request.param, tmp_path_factory.mktemp("kernels")))


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().pow(2).mean().sqrt())


def tensors_of(store: KvStore) -> list[torch.Tensor]:
    return [*store.keys, *store.values]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "num_inputs"), [(960, 576), (131, 48), (50, 37), (1, 2), (49, 1)])
def test_a_linear_layer_agrees_with_fp64_and_with_itself_one_token_at_a_time(
    library: Kernels, dtype: torch.dtype, outputs: int, num_inputs: int
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, num_inputs).to(dtype), torch.randn(outputs).to(dtype)
    packed = PackedLinear(weight, bias, Packing.NATIVE, library)
    for tokens in (*range(1, 18), 28, 29, 31, 43):
        x = torch.randn(tokens, num_inputs).to(dtype)
        truth = x.double() @ weight.double().T + bias.double()
        wide = packed.wide(x)
        assert rms(wide - truth) < 1e-6 * num_inputs**0.5
        assert torch.equal(packed(x), wide.to(dtype))
        assert torch.equal(torch.cat([packed.wide(row) for row in x.split(1)]), wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", Packing)
def test_a_linear_layer_is_the_same_in_every_packing(library: Kernels, packing: Packing, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(50, 24).to(dtype), torch.randn(50).to(dtype), torch.randn(2, 3, 24).to(dtype)
    packed = PackedLinear(weight, bias, packing)
    truth = x.double() @ weight.double().T + bias.double()
    assert rms(packed(x) - truth) < (1e-5 if dtype == torch.float32 else 3e-2)
    assert rms(packed.wide(x) - truth) < (1e-5 if dtype == torch.float32 else 3e-2)
    assert torch.equal(packed.unpacked(), weight)
    assert torch.equal(packed.rows(torch.tensor([49, 0, 7])), weight[[49, 0, 7]])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_native_decoder_computes_with_the_weights_it_was_given(
    library: Kernels, tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    folder = make_tiny_checkpoint(tmp_path, tie_word_embeddings=tied)
    spec, cpu = ModelSpec.from_folder(folder), torch.device("cpu")
    given = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    builders = {each: DecoderBuilder(spec, RopeTable(spec, 64, dtype, cpu), dtype, cpu, each) for each in Packing}
    decoders = {}
    for packing, builder in builders.items():
        for name, tensor in given.items():
            builder.add(name, tensor)
        decoders[packing] = builder.finish()
    native, plain = decoders[Packing.NATIVE], decoders[Packing.PLAIN]
    assert (native.embedding is None) == tied  # a tied table exists once
    tokens = torch.tensor([5, 130, 0, 5])
    for decoder in decoders.values():
        assert torch.equal(decoder.embed(tokens), given["model.embed_tokens.weight"][tokens])
        read = named_tensors(decoder)
        assert read.keys() == given.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in given.items())
    hidden = torch.randn(5, spec.hidden_size).to(dtype)
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert rms(native.logits(hidden) - plain.logits(hidden)) < bound * rms(plain.logits(hidden))
    assert rms(native.final_norm(hidden) - plain.final_norm(hidden)) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(131, 48), (48, 37), (1, 1)])
def test_a_packed_weight_reads_back_bit_for_bit(library: Kernels, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)  # NaNs and infinities among them
    weight = words.view(torch.float32) if dtype == torch.float32 else words.to(torch.int16).view(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    packed = PackedLinear(weight, None, Packing.NATIVE, library)
    assert torch.equal(packed.unpacked().view(bits), weight.view(bits))
    some = torch.tensor([shape[0] - 1, 0])
    assert torch.equal(packed.rows(some).view(bits), weight[some].view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spans", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_as_near_to_fp64_as_torchs_operators(
    library: Kernels, shape: tuple[int, int, int], spans: list[RowSpan], dtype: torch.dtype
) -> None:
    spec = block_spec(*shape)
    blocks = RandomBlocks.make(spec, dtype, biased=shape[0] % 2 == 0, normed=shape[0] % 4 == 0)
    x, cache = inputs(spec, spans, dtype), RandomCache(spec, dtype)
    plans = {each: cache.plan(spans, each) for each in (dtype, torch.float64)}
    native_plan = cache.plan(spans, dtype)
    truth, (true_middle,) = blocks.stack(torch.float64, Packing.PLAIN).run(x.double(), plans[torch.float64], (0,))
    torchs, (torchs_middle,) = blocks.stack(dtype, Packing.PLAIN).run(x, plans[dtype], (0,))
    native, captured = blocks.stack(dtype, Packing.NATIVE, library).run(x, native_plan, (1, 0, 1))
    # Rounding errors of few numbers vary; a wrong mask or position is of the size of the results themselves.
    allowance = 1.5 if dtype == torch.bfloat16 and len(x) > 100 else 5.0
    assert rms(native - truth) < allowance * rms(torchs - truth) + 1e-6
    assert rms(captured[1] - true_middle) < allowance * rms(torchs_middle - true_middle) + 1e-6
    assert torch.equal(captured[0], native)
    assert torch.equal(captured[2], native)
    untouched = torch.ones(cache.rows, cache.capacity, dtype=torch.bool)
    for span in spans:
        untouched[span.row, span.start : span.end] = False
    stores = [tensors_of(plan.store) for plan in (native_plan, plans[torch.float64], cache.plan(spans, dtype))]
    for written, true, before in zip(*stores, strict=True):
        written, true, before = (each.transpose(1, 2) for each in (written, true, before))
        assert torch.equal(written[untouched], before[untouched])
        assert rms((written - true)[~untouched]) < (1e-5 if dtype == torch.float32 else 1e-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tokens_result_is_bitwise_the_same_in_any_company(
    library: Kernels, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    spec = block_spec(*shape)
    stack = RandomBlocks.make(spec, dtype).stack(dtype, Packing.NATIVE, library)
    x = inputs(spec, [RowSpan(0, 0, 30)], dtype)

    # One store for all, whose rows have the same past: row 0 decodes tokens 0..5 one by one, row 1 all in one pass, ...
    plan = RandomCache(spec, dtype).plan([RowSpan(0, 0, 1, 0, 40)], dtype)
    for tensor in tensors_of(plan.store):
        tensor[1:4, :, :11] = tensor[0, :, :11]

    def run(spans: Sequence[RowSpan], tokens: Sequence[int]) -> torch.Tensor:
        return stack.run(x[list(tokens)], replace(plan, spans=tuple(spans)))[0]

    alone = torch.cat([run([RowSpan(0, 11 + i, 1, 0, 40)], [i]) for i in range(6)])
    together = run([RowSpan(1, 11, 6, 0, 40)], range(6))
    crowd = run([RowSpan(2, 11, 6, 0, 40), RowSpan(3, 30, 9), RowSpan(4, 0, 15, 1, 3)], range(30))
    # Tokens 0, 2, 4 as one path of a tree whose other nodes are siblings between them, against the chain 0, 2, 4.
    tree = run([RowSpan(3, 11, 5, 0, 40, (-1, 0, 0, 1, 2))], range(5))
    chain = run([RowSpan(0, 11, 3, 0, 40)], (0, 2, 4))
    assert torch.equal(together, alone)
    assert torch.equal(crowd[:6], alone)
    assert torch.equal(tree[[0, 2, 4]], chain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
def test_a_smaller_machine_computes_the_same_up_to_rounding_and_is_as_indifferent_to_company(
    library: Kernels, other_library: Kernels, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    spec = block_spec(*shape)
    blocks = RandomBlocks.make(spec, dtype, biased=True, normed=True)
    here, there = (blocks.stack(dtype, Packing.NATIVE, each) for each in (library, other_library))
    cache = RandomCache(spec, dtype)
    for spans in PASSES.values():
        x = inputs(spec, spans, dtype)
        result, expected = (each.run(x, cache.plan(spans, dtype))[0] for each in (there, here))
        assert rms(result - expected) < (1e-5 if dtype == torch.float32 else 3e-2) * rms(expected)
        first = spans[0].count
        assert torch.equal(there.run(x[:first], cache.plan(spans[:1], dtype))[0], result[:first])
    weight = torch.randn(131, 37).to(dtype)
    packed = PackedLinear(weight, None, Packing.NATIVE, other_library)
    assert torch.equal(packed.unpacked(), weight)
    x = torch.randn(11, 37).to(dtype)
    assert rms(packed.wide(x) - x.double() @ weight.double().T) < 1e-5


def test_the_first_blocks_attention_reads_what_it_is_given() -> None:
    spec, dtype = block_spec(6, 2, 16), torch.float32
    blocks = RandomBlocks.make(spec, dtype)
    wide = 2 * spec.hidden_size
    blocks.weights[0]["qkv"] = torch.randn(blocks.weights[0]["qkv"].shape[0], wide) / wide**0.5
    spans = [RowSpan(0, 3, 300), RowSpan(1, 9, 1)]
    x, ready = inputs(spec, spans, dtype), torch.randn(301, wide)
    expected, _ = blocks.stack(dtype, Packing.PLAIN).run(x, RandomCache(spec, dtype).plan(spans, dtype), (), ready)
    native, _ = blocks.stack(dtype, Packing.NATIVE).run(x, RandomCache(spec, dtype).plan(spans, dtype), (), ready)
    assert rms(native - expected) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit_also_when_two_callers_meet(dtype: torch.dtype) -> None:
    spec, spans = block_spec(9, 3, 64), PASSES["ragged"]
    stack = RandomBlocks.make(spec, dtype).stack(dtype, Packing.NATIVE)
    x = inputs(spec, spans, dtype)

    def run(_: int) -> torch.Tensor:
        return stack.run(x, RandomCache(spec, dtype).plan(spans, dtype))[0]

    expected, before = run(0), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(2) as callers:
            results = list(callers.map(run, range(40)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, expected) for result in results)


FORKING = """
import os, threading, torch
from rollout.embedded.linear import PackedLinear, Packing

torch.set_num_threads(3)
layer, x = PackedLinear(torch.randn(4000, 256), None, Packing.NATIVE), torch.randn(16, 256)
expected = layer.wide(x)

def compute():
    while True:
        layer.wide(x)

threading.Thread(target=compute, daemon=True).start()
for _ in range(20):
    child = os.fork()
    if not child:
        os._exit(0 if all(torch.equal(layer.wide(x), expected) for _ in range(3)) else 1)
    assert os.waitpid(child, 0)[1] == 0, "the child computed something else"
os._exit(0)
"""


def test_a_forked_child_computes_without_its_parents_threads(library: Kernels) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sample_is_bitwise_the_same_alone_in_a_batch_and_speculated(
    library: Kernels, tmp_path: Path, dtype: str
) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    prompts = [random_prompt(9 + 5 * index, seed=index) for index in range(4)]
    requests = [GroupRequest(str(index), prompt, (0, 1), greedy(24)) for index, prompt in enumerate(prompts)]
    core = make_core(engine_config(folder, dtype=dtype))
    plain = run(core, requests)
    alone = run(core, requests[2:3])
    drafter = ReplayDrafter(plain, prompts, wrong_every=3)
    speculated = run(make_core(engine_config(folder, "LOOKUP", dtype=dtype), drafter=drafter), requests)
    assert any(accepted for _, accepted in drafter.observed), "some drafts stand"
    for key, sample in plain.items():
        for other in [speculated[key], *([alone[key]] if key in alone else [])]:
            assert other.token_ids == sample.token_ids
            assert other.logprobs == sample.logprobs


def test_without_a_compiler_the_torch_path_is_taken_and_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.delenv(MODE_VARIABLE, raising=False)
    fresh = kernels.__wrapped__  # not the cached answer of this process
    assert fresh() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no C compiler" in caplog.text
    monkeypatch.setenv(MODE_VARIABLE, "native")
    with pytest.raises(BuildError, match="no C compiler"):
        fresh()
    monkeypatch.setenv(MODE_VARIABLE, "fast")
    with pytest.raises(ConfigError, match="auto, native, torch"):
        fresh()


def test_a_failing_compiler_leaves_its_message_and_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "out of registers" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(BuildError, match="out of registers"):
        build_library(cache=tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.so")) == []


@pytest.mark.parametrize("machine_flags", [NATIVE, *OTHER_MACHINES.values()], ids=["this machine", *OTHER_MACHINES])
def test_the_sources_compile_without_a_warning(library: Kernels, machine_flags: tuple[str, ...]) -> None:
    command = ["cc", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *FLAGS, *machine_flags, str(MAIN)]
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("width", [1, 7, 64, 131, 5000])
def test_a_race_has_the_same_winner_on_every_machine(library: Kernels, other_library: Kernels, width: int) -> None:
    torch.manual_seed(width)
    keys = np.random.default_rng(width).integers(0, 2**64, 60, dtype=np.uint64)
    token_ids = torch.randperm(2 * width)[:width]
    for spread in (0.0, 1.0, 8.0):
        weights = (spread * torch.randn(60, width)).softmax(-1)
        weights[torch.rand(60, width) < 0.3] = 0.0
        for names in (None, token_ids):
            expected = race_in_numpy(weights, keys, names)
            assert torch.equal(library.race(weights, keys, names), expected)
            assert torch.equal(other_library.race(weights, keys, names), expected)
