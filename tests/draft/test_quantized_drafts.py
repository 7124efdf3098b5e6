"""Rounded linear layers compute with exactly the weights they say they have."""

import math
from pathlib import Path

import pytest
import torch

from rollout.embedded.drafters.fp8_blocks import from_fp8, to_fp8
from rollout.embedded.drafters.quantized import Fp8Linear, Int8Linear, make_linear
from rollout.embedded.kernels.build import build_library
from rollout.embedded.kernels.library import Kernels, kernels
from rollout.embedded.linear import PackedLinear
from slime_spec.config.speculation import check_fp8
from slime_spec.errors import ConfigError
from tests.support.fp8_on_cpu import product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (61, 49), (96, 64), (200, 37)])
def test_int8_linears_compute_with_the_rounded_weights_whoever_else_is_in_the_pass(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    x = torch.randn(19, shape[1], generator=generator).to(dtype)
    linear = Int8Linear(weight, bias)
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight.float() / scale).round()
    assert rounded.abs().max() == 127
    assert torch.equal(linear.unpacked(), (rounded * scale).to(dtype))
    exact = x.double() @ (rounded.double() * scale.double()).T + bias.double()
    assert (linear.wide(x).double() - exact).abs().max() < 1e-5
    assert torch.equal(linear(x), linear.wide(x).to(dtype))
    assert torch.equal(linear(x)[7:8], linear(x[7:8]))
    assert all(torch.equal(linear(x)[:tokens], linear(x[:tokens])) for tokens in range(1, 20))  # tiles of every size
    assert torch.equal(linear.rows(torch.tensor([0])), linear.unpacked()[:1])


def test_int8_linears_without_kernels_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(40, 24), torch.randn(5, 24)
    native = Int8Linear(weight)
    monkeypatch.setattr("rollout.embedded.drafters.quantized.kernels", lambda: None)
    plain = Int8Linear(weight)
    assert torch.equal(plain.unpacked(), native.unpacked())
    assert (plain(x) - native(x)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("machine", ["haswell", "x86-64"])
def test_int8_linears_are_the_same_on_machines_with_narrower_vectors(
    tmp_path: Path, machine: str, dtype: torch.dtype
) -> None:
    if kernels() is None:
        pytest.skip("no compiler here")
    other = Kernels(build_library((f"-march={machine}", "-O1"), tmp_path))
    weight, bias, x = torch.randn(61, 49).to(dtype), torch.randn(61).to(dtype), torch.randn(11, 49).to(dtype)
    here, there = Int8Linear(weight, bias), Int8Linear(weight, bias, other)
    assert here.library.panel_rows > there.library.panel_rows
    assert torch.equal(here.unpacked(), there.unpacked())
    assert (here.wide(x) - there.wide(x)).abs().max() < 1e-4


SPREAD = {"of one size": 0.0, "of many sizes": 3.0}  # decades to either side of 1
SHAPES = [(1, 1), (128, 128), (130, 257), (61, 384), (2100, 3)]


def random_matrix(shape: tuple[int, int], decades: float, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = 10 ** (decades * (2 * torch.rand(shape, generator=generator) - 1))
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decades", SPREAD.values(), ids=SPREAD)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_fp8_weight_is_within_half_a_step_of_e4m3_of_what_it_was(
    shape: tuple[int, int], decades: float, dtype: torch.dtype
) -> None:
    """Three bits after the leading one: half a step is a sixteenth of a number, or below 2^-6 a step of 2^-9."""
    weight = random_matrix(shape, decades, dtype)
    linear = Fp8Linear(weight)
    back = linear.unpacked()
    assert back.dtype == dtype
    for top in range(0, shape[0], 128):
        for left in range(0, shape[1], 128):
            block = slice(top, top + 128), slice(left, left + 128)
            largest = float(weight[block].abs().max())
            # The least power of two that brings the largest weight to 448 or less.
            scale = 2.0 ** math.ceil(math.log2(largest / 448))
            assert 224 < largest / scale <= 448
            exact = weight[block].double()
            half_a_step = torch.maximum(exact.abs() / 16, torch.full_like(exact, scale * 2**-10))
            assert ((back[block].double() - exact).abs() <= half_a_step).all()
            assert float(back[block].abs().max()) > 0.9 * largest


@pytest.mark.parametrize("largest", [448.0, 449.0, 2.0**-140, 3e38, 1.75 * 2**30])
def test_the_scale_of_a_block_is_a_power_of_two_that_overflows_nothing(largest: float) -> None:
    weight = torch.zeros(128, 128)
    weight[7, 9] = largest
    codes, scales = to_fp8(weight)
    assert math.frexp(scales.item())[0] == 0.5
    assert scales.item() >= 2.0**-126
    assert from_fp8(codes, scales)[7, 9] == pytest.approx(largest, rel=1 / 16, abs=2**-135)
    assert from_fp8(codes, scales).count_nonzero() == (1 if largest > 2**-136 else 0)
    assert to_fp8(torch.zeros(3, 3))[0].float().count_nonzero() == 0


def test_a_weight_that_is_no_number_stays_none() -> None:
    weight = torch.ones(4, 300)
    weight[1, 2], weight[2, 200] = float("nan"), float("inf")
    back = Fp8Linear(weight).unpacked()
    assert not back[1, 2].isfinite()
    assert not back[2, 200].isfinite()
    assert torch.equal(back[:, 256:], weight[:, 256:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "shape"), [(1, (48, 80)), (3, (130, 257)), (16, (61, 384)), (70, (33, 48)), (2, (128, 128))]
)
def test_the_fp8_kernel_multiplies_by_exactly_the_weights_it_says_it_has(
    tokens: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, bias = random_matrix(shape, 0.5, dtype), random_matrix((1, shape[0]), 0.0, dtype)[0]
    x = random_matrix((tokens, shape[1]), 1.0, dtype)
    linear = Fp8Linear(weight, bias)
    exact = product(x, linear._weight, linear._scales, bias, torch.float64)
    size = product(x.abs(), linear._weight.float().abs().to(torch.float8_e4m3fn), linear._scales, bias.abs(), dtype)
    # Sums of fp32 over every input, in any order.
    assert ((linear.wide(x).double() - exact).abs() <= shape[1] * 2**-24 * size.double()).all()
    wide, narrow = linear.wide(x), linear(x)
    assert narrow.dtype == dtype
    # Within a step of the dtype: the interpreter cuts off where a GPU rounds.
    assert ((narrow.float() - wide).abs() <= torch.finfo(dtype).eps * wide.abs()).all()
    assert torch.equal(linear(x[None])[0], narrow)


def test_the_reference_of_fp8_products_is_a_product_by_the_unpacked_weights() -> None:
    weight, x = random_matrix((130, 140), 0.5, torch.float32), random_matrix((3, 140), 0.0, torch.float32)
    linear = Fp8Linear(weight)
    expected = x.double() @ linear.unpacked().double().T
    assert torch.equal(product(x, linear._weight, linear._scales, None, torch.float64), expected)
    assert (expected - x.double() @ weight.double().T).abs().max() > 1e-3


def test_a_layer_has_the_form_that_was_asked_for() -> None:
    forms = {None: PackedLinear, "int8": Int8Linear, "fp8": Fp8Linear}
    assert {name: type(make_linear(torch.randn(33, 48), None, name)) for name in forms} == forms


@pytest.mark.parametrize(
    ("capability", "is_refused"), [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)]
)
def test_fp8_is_refused_on_a_gpu_without_it(capability: tuple[int, int], is_refused: bool) -> None:
    if not is_refused:
        check_fp8(capability)
        return
    with pytest.raises(ConfigError, match=r"compute capability 8.9 or later .* \(got 'fp8 on a GPU of 8\.\d'\)"):
        check_fp8(capability)
