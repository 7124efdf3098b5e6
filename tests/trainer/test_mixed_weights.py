"""Weights of policies with experts are exported, pushed, saved and resumed whole, the routers' biases in float32."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.parameters import count_parameters
from slime_spec.checkpoints.tensors import expected_shapes, load_tensors, stored_tensors
from slime_spec.config.tree import Config, EngineConfig
from slime_spec.interfaces import RunState
from slime_spec.preflight.trainer_memory import trainer_memory
from tests.support.tiny_models import MIXED, add_mtp_layer, load_reference
from tests.trainer.mixed_policies import DP2_EP2, LAYOUTS, SPLIT, TP2_EP2, mixed_policy
from tests.trainer.test_offload_train import ENGINE_DTYPE
from tests.trainer.trainer_support import run_ranks, tiny_config, tiny_samples
from trainer_bridge.microbatch import SegmentSpan, build_microbatch
from trainer_bridge.packing import plan_microbatches

pytestmark = pytest.mark.proves("trainer_bridge")

BIAS = "e_score_correction_bias"
STATE = RunState(rollout_id=7, next_prompt_id=56, weight_version=6)
BEFORE, AFTER = ([tiny_samples(seed) for seed in seeds] for seeds in ((1, 2), (3, 4)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: mixed_policy(tmp_path_factory.mktemp("policy"), name) for name in MIXED}


@pytest.fixture
def folder(folders: dict[str, Path]) -> Path:
    return folders["DeepseekV3ForCausalLM"]


def test_a_bfloat16_policy_keeps_its_routers_biases_unrounded(folder: Path) -> None:
    saved = load_file(folder / "model.safetensors")
    ((weights, logits, _, bias_dtypes),) = run_ranks(
        1, "mixed_pass", tiny_config(folder, {"dtype": "bfloat16"}), tiny_samples()
    )
    assert bias_dtypes == "torch.float32"
    assert all(logit.isfinite().all() for logit in logits.values())
    for name, tensor in weights.items():
        expected = saved[name] if BIAS in name else saved[name].bfloat16()
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor, expected), name
    assert any(not torch.equal(saved[name], saved[name].bfloat16().float()) for name in saved if BIAS in name)


@pytest.mark.parametrize("layout", ["one rank", "TP2 EP2", "PP2", "DP2 EP2"])
def test_a_rank_reads_what_it_has_a_part_of_and_all_ranks_read_everything(layout: str, folder: Path) -> None:
    """Of R1's 690 GB each of 128 ranks would read all."""
    config = tiny_config(folder, dict(LAYOUTS[layout]))
    of_ranks = [set(names) for names in run_ranks(config.trainer.world_size, "names_read", config)]
    assert set.union(*of_ranks) == load_file(folder / "model.safetensors").keys()
    if "EP2" in layout:
        experts = [{int(name.split(".")[5]) for name in names if ".experts." in name} for names in of_ranks]
        assert experts == [set(range(4)), set(range(4, 8))]
    if layout == "PP2":
        layers = [{int(name.split(".")[2]) for name in names if ".layers." in name} for names in of_ranks]
        assert layers == [{0, 1}, {2, 3}]
        tables = [{name for name in names if ".layers." not in name} for names in of_ranks]
        assert tables == [{"model.embed_tokens.weight"}, {"model.norm.weight", "lm_head.weight"}]


@pytest.mark.parametrize("architecture", MIXED)
@pytest.mark.parametrize("layout", ["TP2 EP2", "TP2 ETP2", "PP2", "DP2 EP2"])
def test_an_export_has_every_expert_once_and_transformers_loads_it(
    layout: str, architecture: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    source, target = folders[architecture], tmp_path / "export"
    run_ranks(2, "export", tiny_config(source, dict(LAYOUTS[layout])), str(target))
    original, exported = load_file(source / "model.safetensors"), load_tensors(target, ModelSpec.from_folder(target))
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in original.items())
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load_reference(target)(tokens).logits, load_reference(source)(tokens).logits)


def test_a_bfloat16_export_has_every_mtp_layer_and_every_routers_bias_unrounded(tmp_path: Path) -> None:
    """A second MTP layer is none that is computed here; it leaves the checkpoint as little as the first."""
    source = add_mtp_layer(mixed_policy(tmp_path / "policy", "Glm4MoeForCausalLM"))
    num_layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    first, second = (f"model.layers.{num_layers + index}." for index in range(2))
    stored = load_file(source / "model.safetensors")
    stored |= {name.replace(first, second): each + 0.0 for name, each in stored.items() if name.startswith(first)}
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    run_ranks(2, "export", tiny_config(source, {**LAYOUTS["PP2"], "dtype": "bfloat16"}), str(tmp_path / "export"))
    original = load_file(source / "model.safetensors")
    exported = dict(stored_tensors(tmp_path / "export", lambda name: True))
    assert exported.keys() == original.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, original[name] if BIAS in name else original[name].bfloat16()), name
    assert sum(BIAS in name for name in exported) == 5


@pytest.mark.parametrize("layout", [TP2_EP2, DP2_EP2], ids=["TP2 EP2", "DP2 EP2"])
def test_the_first_rank_publishes_every_expert(layout: Mapping[str, Any], folder: Path) -> None:
    (num_buckets, names), nothing = run_ranks(2, "push_to_a_receiver", tiny_config(folder, dict(layout)))
    assert set(names) == expected_shapes(ModelSpec.from_folder(folder)).keys()
    assert len(names) == len(set(names))
    assert num_buckets > 1
    assert nothing == (0, [])


def test_engines_of_bfloat16_are_sent_the_routers_biases_in_float32(folder: Path) -> None:
    config = replace(tiny_config(folder, dict(DP2_EP2)), engine=EngineConfig(dtype="bfloat16"))
    dtypes, _ = run_ranks(2, "pushed_dtypes", config)
    assert {dtype for name, dtype in dtypes.items() if BIAS in name} == {"float32"}
    assert {dtype for name, dtype in dtypes.items() if BIAS not in name} == {"bfloat16"}


def resumed_from(config: Config, checkpoints: Path) -> Config:
    return replace(config, trainer=replace(config.trainer, load=str(checkpoints)))


@pytest.mark.parametrize("architecture", MIXED)
@pytest.mark.parametrize(
    "layout",
    [
        TP2_EP2,
        LAYOUTS["TP2 ETP2"],
        LAYOUTS["PP2"],
        SPLIT,
        {**SPLIT, "dtype": "bfloat16", "optimizer_cpu_offload": True},
    ],
    ids=["TP2 EP2", "TP2 ETP2", "PP2", "DP2 EP2 and a distributed optimizer", "the same of bfloat16 on the host"],
)
def test_a_resumed_run_repeats_the_uninterrupted_ones_next_steps_exactly(
    layout: Mapping[str, Any], architecture: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = tiny_config(folders[architecture], {**layout, "lr_warmup_steps": 4})
    uninterrupted = run_ranks(2, "save_and_continue", config, BEFORE, AFTER, str(tmp_path), STATE)[0]
    state, reports = run_ranks(2, "resume", resumed_from(config, tmp_path), AFTER)[0]
    assert state == STATE
    assert reports == uninterrupted


@pytest.mark.parametrize(
    ("before", "after"),
    [(TP2_EP2, {}), (SPLIT, TP2_EP2), (LAYOUTS["PP2"], DP2_EP2)],
    ids=["TP2 EP2 on one rank", "a distributed optimizer on TP2 EP2", "PP2 on DP2 EP2"],
)
def test_a_checkpoint_resumes_with_another_layout(
    before: Mapping[str, Any], after: Mapping[str, Any], folder: Path, tmp_path: Path
) -> None:
    saved = run_ranks(2, "save_and_continue", tiny_config(folder, dict(before)), BEFORE, AFTER, str(tmp_path), STATE)[0]
    config = resumed_from(tiny_config(folder, dict(after)), tmp_path)
    state, reports = run_ranks(config.trainer.world_size, "resume", config, AFTER)[0]
    assert state == STATE
    for got, expected in zip(reports, saved, strict=True):
        assert got.loss == pytest.approx(expected.loss, abs=1e-4)
        assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)


@pytest.mark.parametrize("multiple", [2, 4])
def test_rows_are_padded_to_a_multiple_by_a_segment_that_predicts_nothing(multiple: int) -> None:
    samples, cpu = tiny_samples(), torch.device("cpu")
    (plans,) = plan_microbatches(samples, max_tokens=30, num_ranks=1)
    for plan in [*plans, ()]:
        plain, padded = (build_microbatch(samples, plan, cpu, each) for each in (1, multiple))
        num_plain, num_padded = plain.token_ids.size(1), padded.token_ids.size(1)
        assert num_padded % multiple == 0
        assert num_padded - num_plain < multiple
        assert torch.equal(padded.rows, plain.rows)
        assert torch.equal(padded.weights, plain.weights)
        assert torch.equal(padded.token_ids[:, :num_plain], plain.token_ids)
        if plan and num_padded > num_plain:
            assert padded.spans == (*plain.spans, SegmentSpan(num_plain, num_padded - num_plain, ()))


@pytest.mark.parametrize("layout", [TP2_EP2, SPLIT], ids=["TP2 EP2", "DP2 EP2 and a distributed optimizer"])
def test_experts_leave_the_device_with_the_rest_and_the_memory_plan_counts_them(
    layout: Mapping[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders["Qwen3MoeForCausalLM"]
    config = replace(tiny_config(folder, dict(layout)), engine=EngineConfig(dtype=ENGINE_DTYPE))
    left = run_ranks(2, "leave_between_phases", config, BEFORE, str(tmp_path), STATE)
    stayed = run_ranks(2, "train", config, BEFORE)
    target = json.loads((folder / "config.json").read_text())
    counted = count_parameters(target)
    assert counted is not None
    (plan,) = trainer_memory(config, target, counted)
    for (resident, reports, pushed), (_, expected, weights) in zip(left, stayed, strict=True):
        assert reports == expected
        assert all(torch.equal(tensor, weights[name].half()) for name, tensor in pushed.items())
        assert not any(num_bytes for phase in ("rollout", "between", "end") for num_bytes in resident[phase].values())
        assert resident["counted"]["parameters"] == plan.num_parameters
        assert resident["step"]["gradients"] == pytest.approx(plan.gradient_bytes, rel=0.05)  # buffers are padded
    assert left[0][2].keys() == expected_shapes(ModelSpec.from_folder(folder)).keys()
