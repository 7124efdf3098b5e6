"""Rounded linear layers compute with exactly the weights they say they have."""

from pathlib import Path

import pytest
import torch

from rollout.embedded.drafters.quantized import Fp8Linear, Int8Linear, check_fp8, make_linear
from rollout.embedded.kernels.build import build_library
from rollout.embedded.kernels.library import Kernels, kernels
from rollout.embedded.linear import PackedLinear
from slime_spec.errors import ConfigError

CUDA = torch.device("cuda")


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


def test_fp8_linears_are_near_exact_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(96, 64, generator=generator), torch.randn(96, generator=generator)
    x = torch.randn(7, 64, generator=generator) * torch.logspace(-3, 3, 7).unsqueeze(1)  # rows of any size
    linear = Fp8Linear(weight, bias)
    # e4m3 keeps three bits after the leading one: each weight within a sixteenth of itself (or of the smallest step).
    step = weight.abs().amax(dim=1, keepdim=True) / 448
    assert ((linear.unpacked() - weight).abs() <= weight.abs() / 16 + step).all()
    exact = x @ linear.unpacked().T + bias
    errors = (linear(x) - exact).abs().amax(dim=1) / (exact - bias).abs().amax(dim=1)
    assert (errors < 0.05).all()
    assert torch.equal(linear(x[None])[0], linear(x))


def test_matrices_that_fp8_kernels_cannot_take_stay_as_they_are() -> None:
    assert type(make_linear(torch.randn(32, 48), None, "fp8")) is Fp8Linear
    assert type(make_linear(torch.randn(33, 48), None, "fp8")) is PackedLinear
    assert type(make_linear(torch.randn(32, 48), None, None)) is PackedLinear


def test_fp8_is_refused_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_fp8(CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"compute capability 8.9 or later \(got '8.0'\)"):
        check_fp8(CUDA)
