"""The real SGLang serves DeepSeek-V3 in fp8 and loads pushes of codes and scales, as its own loader reads them.

Its kernels for fp8 need a GPU, or AMX; ``fp8_in_torch`` stands in for the products alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import draft_shapes
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.errors import PushError
from slime_spec.weights.run import run_push
from slime_spec.weights.served import ServedForm
from tests.sglang.test_real_families import FEW_BYTES, NUM_TOKENS, assert_same, config_of, make_model, saved_as, sums
from tests.support.fp8_checkpoints import dequantised_by_loop, numbers_of, store_in_fp8, store_numbers
from tests.support.pushes import disturbed, push_of
from tests.support.sglang_real import cpu_environment, generate, greedy, started

pytestmark = [pytest.mark.long, pytest.mark.sglang_server, pytest.mark.proves("rollout.sglang_engine")]

BLOCK = (128, 128)
# SGLang joins gate and up projections, and the two a projections: the first of two must end with a block. And its
# checksums take the columns of a block for those of the matrix over those of its scales.
SIZES: dict[str, Any] = {
    **{"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 8},
    **{"num_key_value_heads": 8, "q_lora_rank": 128, "kv_lora_rank": 128, "v_head_dim": 16},
}


def test_a_server_of_fp8_says_what_transformers_says_with_the_numbers_before_pushes_and_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_STAND_IN_FP8", "1")
    model = store_in_fp8(make_model(tmp_path, "DeepseekV3ForCausalLM", **SIZES), BLOCK)
    spec, stored, numbers = ModelSpec.from_folder(model), load_file(model / "model.safetensors"), numbers_of(model)
    config = config_of(model, tmp_path / "run", has_mtp=True)
    form = ServedForm.of(config)
    pushed = sent(form, {name: numbers[name] for name in expected_shapes(spec)})
    own = sent(form, {name: numbers[name] for name in draft_shapes(DraftSpec.from_folder(model, spec))})
    first, second = store_numbers(model, tmp_path / "numbers"), read(pushed)
    with cpu_environment(), started(config) as engine:

        def said() -> list[tuple[tuple[int, ...], list[float]]]:
            return [(each.token_ids, list(each.logprobs)) for each in generate(engine, NUM_TOKENS)]

        def push(tensors: dict[str, torch.Tensor], version: int, side: Any = "target") -> None:
            messages = push_of(tensors, version, side, bucket_bytes=FEW_BYTES)
            run_push(messages, lambda message: [engine.update_weights(message)], verify=True)

        at_start = {side: sums(engine, side) for side in ("target", "draft")}
        assert all(at_start.values())
        assert "Detected fp8 checkpoint" in (tmp_path / "run" / "engines" / "sglang-0.log").read_text()
        assert_same(said(), greedy(first, NUM_TOKENS))
        push(pushed, 1)
        assert_same(said(), greedy(saved_as(first, second, tmp_path / "second"), NUM_TOKENS))
        changed = {name for name, each in sums(engine, "target").items() if each != at_start["target"][name]}
        assert {name for name in at_start["target"].keys() - changed if not is_constant(name)} == set()
        push(own, 2, "draft")
        moved = {name for name, each in sums(engine, "draft").items() if each != at_start["draft"][name]}
        kept = at_start["draft"].keys() - moved
        assert {name for name in kept if not (is_constant(name) or is_shared(name))} == set()
        # The checkpoint's own codes and scales bring the server back, bit by bit.
        push({name: stored[name] for name in pushed}, 3)
        push({name: stored[name] for name in own}, 4, "draft")
        assert {side: sums(engine, side) for side in at_start} == at_start
        with pytest.raises(PushError, match="lacks"):
            push({name: numbers[name] for name in expected_shapes(spec)}, 5)
        assert_same(said(), greedy(first, NUM_TOKENS))


def sent(form: ServedForm, numbers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other weights than the checkpoint's, as they are pushed."""
    return dict(form.tensors(disturbed(numbers, 1).items()))


def read(pushed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The numbers that pushed codes and scales stand for."""
    return {
        name: dequantised_by_loop(each, pushed[name + "_scale_inv"], BLOCK) if name + "_scale_inv" in pushed else each
        for name, each in pushed.items()
        if not name.endswith("_scale_inv")
    }


def is_constant(name: str) -> bool:
    return any(part in name for part in ("rotary", "cos_sin"))


def is_shared(name: str) -> bool:
    """Whether the tensor is the target's own, which its draft shares."""
    return any(part in name for part in ("embed_tokens", "shared_head.head", "lm_head"))
