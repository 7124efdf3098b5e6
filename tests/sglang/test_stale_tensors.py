"""A server that shows no weights says by its checksums which tensors a push has left as they were."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from rollout.sglang_engine.fake import FakeServer
from rollout.sglang_engine.stale import Served, stale_tensors
from slime_spec.errors import PushError
from tests.sglang.conftest import Checkpoints, Connect
from tests.support.pushes import disturbed, push_of

LAYER = "model.layers.0."
PUSHED = (
    *(f"{LAYER}self_attn.{x}_proj.weight" for x in "qkvo"),
    *(f"{LAYER}self_attn.{x}.weight" for x in ("q_a_proj", "kv_a_proj_with_mqa")),
    *(f"{LAYER}mlp.experts.{e}.{x}_proj.weight" for e in range(3) for x in ("gate", "up", "down")),
    *(f"{LAYER}mlp.shared_experts.{x}_proj.weight" for x in ("gate", "up", "down")),
    *(f"{LAYER}mlp.gate.e_score_correction_bias", "model.norm.weight"),
)
# As SGLang 0.5.21 names them.
SERVED = (
    *(f"{LAYER}self_attn.{x}.weight" for x in ("qkv_proj", "o_proj", "fused_qkv_a_proj_with_mqa")),
    *(f"{LAYER}mlp.experts.{x}_weight" for x in ("w13", "w2")),
    *(f"{LAYER}mlp.shared_experts.{x}.weight" for x in ("gate_up_proj", "down_proj")),
    *(f"{LAYER}mlp.gate.e_score_correction_bias", "model.norm.weight", "model.rotary.cos_sin_cache"),
)


def served(version: int, stale: tuple[str, ...] = (), num_ranks: int = 1, kept: tuple[str, ...] = ()) -> Served:
    """After a push of ``version`` that leaves ``kept`` as the version before has them."""
    sums = {
        f"{rank}:{name}": f"{name}-{version - 1 if name in stale else version}"
        for rank in range(num_ranks)
        for name in SERVED
    }
    return Served({name: version - 1 if name in kept else version for name in PUSHED}, sums)


@pytest.mark.parametrize("name", SERVED[:-1])
def test_each_tensor_that_stays_is_named(name: str) -> None:
    assert stale_tensors(served(1), served(2)) == []
    assert stale_tensors(served(1), served(2, stale=(name,))) == [name]
    assert stale_tensors(served(1, num_ranks=2), served(2, (name,), num_ranks=2)) == [name]


def test_what_the_push_left_alone_or_changed_in_part_may_stay() -> None:
    correction, fused = f"{LAYER}mlp.gate.e_score_correction_bias", f"{LAYER}self_attn.qkv_proj.weight"
    assert stale_tensors(served(1), served(2, (correction,), kept=(correction,))) == []
    assert stale_tensors(served(1), served(2, (fused,), kept=(f"{LAYER}self_attn.k_proj.weight",))) == []


def test_a_slice_of_one_rank_may_stay_where_anothers_moved() -> None:
    now = served(2, num_ranks=2)
    name = f"0:{LAYER}self_attn.o_proj.weight"
    one = Served(now.pushed, {**now.sums, name: served(1, num_ranks=2).sums[name]})
    assert stale_tensors(served(1, num_ranks=2), one) == []


@pytest.mark.parametrize("sums", [{}, {"0:target.model.norm.weight": "1"}])
def test_nothing_is_said_of_tensors_with_other_names(sums: Mapping[str, str]) -> None:
    assert stale_tensors(served(1), Served(served(2).pushed, sums)) is None
    assert stale_tensors(served(1), served(1)) is None  # the same push


def test_a_push_is_verified_by_what_moved_from_the_second_on(connect: Connect, checkpoints: Checkpoints) -> None:
    on_fake = connect(FakeServer())
    weights = checkpoints.target_weights()
    name = f"{LAYER}self_attn.o_proj.weight"
    verified = []
    for version in (1, 2, 3):
        on_fake.server.target_sums = {name: str(version), "model.norm.weight": str(version)}
        verified.append(on_fake.push(push_of(disturbed(weights, version), version), verify=True).verified)
    assert verified == [False, True, True]
    on_fake.server.target_sums = {name: "3", "model.norm.weight": "4"}
    with pytest.raises(PushError, match=f"old values of {name}"):
        on_fake.push(push_of(disturbed(weights, 4), 4), verify=True)
