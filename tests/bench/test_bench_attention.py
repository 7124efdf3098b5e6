"""The parts of ``slime-spec bench device`` that look into a pass: attention compared, and what the time goes to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from slime_spec.bench.device import attention
from slime_spec.bench.device.attention import AttentionSizes, Case, CaseScene, Scene, Way, measure_attention, sizes_on
from slime_spec.bench.device.profile import KINDS, Ran, kind_of, profile_shape, times_by_kind
from slime_spec.bench.device.random_model import TINY
from slime_spec.bench.rows import Row

CPU = torch.device("cpu")
# A tree whose slots lie in two blocks: the context ends within the first.
SIZES = AttentionSizes(TINY, torch.float32, (126,), (1, 2), (4,), num_rounds=1)


def by_id(rows: list[Row]) -> dict[str, Row]:
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: row for row in rows}


def test_all_ways_of_attention_agree_and_are_held_against_the_best() -> None:
    rows = by_id(measure_attention(CPU, replace(SIZES, rows=(2,))))
    assert rows["device.attention.agree"].holds
    ratios = [rows[f"device.attention.c126.b2.k4.{name}.ratio"].value for name in attention.WAYS]
    assert min(ratios) == 1.0
    assert rows["device.attention.c126.b2.k4.best"].value > 0
    assert len(rows) == 1 + len(attention.WAYS) + 1


def test_a_way_that_computes_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(at: CaseScene) -> Way:
        right = attention.contiguous(at)
        return lambda window: right(window) + 1e-3

    monkeypatch.setattr(attention, "WAYS", {"contiguous": attention.contiguous, "gathered": shifted})
    row = by_id(measure_attention(CPU, SIZES))["device.attention.agree"]
    assert (row.value, row.holds) == (0.5, False)
    assert row.what.endswith("; not c126.b1.k4 gathered, c126.b2.k4 gathered")


def test_a_way_that_cannot_run_says_why_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(at: CaseScene) -> Way:
        raise RuntimeError("out of shared memory\nin a kernel")

    monkeypatch.setattr(attention, "WAYS", {"flex": fails, "contiguous": attention.contiguous})
    rows = by_id(measure_attention(CPU, SIZES))
    failed = rows["device.attention.c126.b2.k4.flex.ratio"]
    assert math.isnan(failed.value)
    assert failed.holds is None
    assert failed.what.endswith("out of shared memory")
    assert rows["device.attention.c126.b2.k4.contiguous.ratio"].value == 1.0
    assert rows["device.attention.agree"].holds


def test_cases_for_which_there_is_no_time_are_named() -> None:
    rows = by_id(measure_attention(CPU, AttentionSizes(TINY, torch.float32, (5,), (1,), (1,), 1, seconds=0.0)))
    assert rows["device.attention.left_out"].what.endswith("c5.b1.k1")
    assert rows["device.attention.agree"].holds is False


def test_windows_cover_all_sequences_once_so_that_no_keys_were_read_before() -> None:
    scene = Scene(SIZES, CPU, seed=0)
    at = CaseScene(scene, Case(126, 1, 4))
    assert [row for window in at.windows for row in range(scene.num_rows)[at.rows_of(window)]] == [0, 1]
    outs = [attention.gathered(at)(window) for window in at.windows]
    assert not torch.allclose(*outs)
    assert torch.allclose(outs[1], attention.contiguous(at)(1), atol=1e-5)
    assert torch.allclose(outs[1], attention.flex(at)(1), atol=1e-5)
    assert torch.allclose(outs[1], attention.ours(at)(1), atol=1e-5)


def test_a_gpu_compares_the_contexts_rows_and_tokens_of_a_rollout() -> None:
    sizes = sizes_on(torch.device("cuda"), 10, 110.0)
    assert len(sizes.cases) == 27
    assert {(case.context, case.rows, case.tokens) for case in sizes.cases} >= {(512, 1, 1), (8192, 64, 8)}
    assert sizes.capacity % attention.PAGE == 0


NAMES = {
    "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": "products",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>": "products",
    "gemvx::kernel": "products",
    "cublasLt::splitKreduce_kernel": "products",
    "add_and_norm": "kernels",
    "attend_split": "kernels",
    "merge_splits": "kernels",
    "Memcpy HtoD (Pageable -> Device)": "other",
    "void at::native::vectorized_elementwise_kernel": "other",
}


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_a_kernels_name_says_what_it_is_part_of(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_the_times_of_a_pass_add_up_with_what_runs_beside_counted_once() -> None:
    ran = [
        Ran("add_and_norm", 10.0, 12.0),
        Ran("gemv", 13.0, 20.0),
        Ran("copy", 18.0, 21.0),
        Ran("copy", 18.5, 19.0),
        Ran("gemv", 23.0, 24.0),
    ]
    found = times_by_kind(reversed(ran))
    assert found == {"products": 8.0, "kernels": 2.0, "other": 1.0, "gaps": 3.0}
    assert sum(found.values()) == 24.0 - 10.0


def test_a_watched_pass_on_a_cpu_has_products_and_shares_that_add_up() -> None:
    rows = by_id(profile_shape("tiny", TINY, CPU, num_rounds=1))
    for batch_size in (1, 8):
        prefix = f"device.tiny.profile.b{batch_size}"
        assert rows[f"{prefix}.products"].value > 0
        assert sum(rows[f"{prefix}.{kind}_share"].value for kind in KINDS) == pytest.approx(1.0)
        assert rows[f"{prefix}.pass"].value > 0
    ways = [id.rpartition(".")[2] for id in rows if id.startswith("device.tiny.product.k1.down.")]
    assert ways == ["library", "tile8x512", "tile4x1024"]
    assert all(row.value > 0 for id, row in rows.items() if id.startswith("device.tiny.product."))
