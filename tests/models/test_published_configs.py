"""Every published config.json is computed as transformers reads it, or refused with the way to serve it.

The tables of them are ``tests.support.published_configs`` and its neighbours.
"""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import draft_shapes
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.parameters import count_parameters
from slime_spec.checkpoints.quantization import BlockScheme, scheme_of
from slime_spec.checkpoints.tensors import expected_shapes
from slime_spec.errors import CheckpointError, NotComputedError
from slime_spec.launch.cli import main
from tests.support.chat_templates import QWEN2_5, save_tokenizer
from tests.support.published_configs import BUILT, PARAMETERS
from tests.support.published_drafts import DRAFTS, OTHER_WRITERS
from tests.support.published_served import FP8, MIXED, SERVED

MODELOPT = "nvidia/Llama-3.1-8B-Instruct-FP8"  # its config.json is the unquantised model's


def saved_by_transformers_5(config: dict[str, Any], folder: Path, model_type: str | None = None) -> dict[str, Any]:
    """The config.json that transformers writes again after reading ``config``; MiMo's class extends Qwen2's."""
    values = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    model_type = model_type or config["model_type"].replace("mimo", "qwen2")
    AutoConfig.for_model(model_type, **values).save_pretrained(folder)
    saved: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in saved
    assert "torch_dtype" not in saved
    return saved


@pytest.mark.parametrize("name", {**BUILT, **MIXED})
def test_a_published_model_is_computed_from_either_spelling_of_its_keys(name: str, tmp_path: Path) -> None:
    config = {**BUILT, **MIXED}[name]
    spec = ModelSpec.from_dict(config)
    assert ModelSpec.from_dict(saved_by_transformers_5(config, tmp_path)) == spec
    if name in PARAMETERS:
        assert sum(map(prod, expected_shapes(spec).values())) == PARAMETERS[name]
    scaling = config.get("rope_scaling") or {}
    assert (spec.rope_scaling.factor if spec.rope_scaling else None) == scaling.get("factor")
    assert spec.rope_theta == config["rope_theta"]


# As their authors count them: the decoder, without the MTP layer.
COUNTED = {"Qwen/Qwen3-235B-A22B": 235_093_634_560, "Qwen/Qwen3-30B-A3B": 30_532_122_624}


@pytest.mark.parametrize("name", MIXED)
def test_a_model_with_experts_has_as_many_numbers_as_its_authors_say(name: str) -> None:
    counted = count_parameters(MIXED[name])
    assert counted is not None
    shapes = expected_shapes(ModelSpec.from_dict(MIXED[name]))
    assert sum(map(prod, shapes.values())) == counted.decoder
    assert counted.decoder == COUNTED.get(name, counted.decoder)


@pytest.mark.parametrize("name", {**BUILT, **MIXED})
def test_each_layer_is_counted_with_its_experts_and_what_every_tensor_rank_has_whole(name: str) -> None:
    config = {**BUILT, **MIXED}[name]
    counted, shapes = count_parameters(config), expected_shapes(ModelSpec.from_dict(config))
    assert counted is not None
    by_layer: dict[int, dict[str, int]] = {}
    for each, shape in shapes.items():
        if each.startswith("model.layers."):
            by_layer.setdefault(int(each.split(".")[2]), {})[each] = prod(shape)
    assert sorted(by_layer) == list(range(len(counted.layers)))
    for number, layer in enumerate(counted.layers):
        own = by_layer[number]
        assert layer.total == sum(own.values())
        assert layer.experts == sum(size for each, size in own.items() if ".mlp.experts." in each)
        whole = ("norm.weight", ".mlp.gate.weight")
        assert layer.whole == sum(size for each, size in own.items() if each.endswith(whole))
        assert layer.corrections == sum(size for each, size in own.items() if each.endswith("e_score_correction_bias"))


@pytest.mark.parametrize("name", [name for name, config in MIXED.items() if config.get("num_nextn_predict_layers")])
def test_the_mtp_layer_behind_the_last_is_a_draft_of_its_target(name: str) -> None:
    config = MIXED[name]
    target, counted = ModelSpec.from_dict(config), count_parameters(config)
    draft = DraftSpec.from_dict(config, target)
    assert (draft.family, draft.in_target, draft.hidden_first) == ("mtp", True, False)
    shapes = draft_shapes(draft)
    own = f"model.layers.{target.num_layers}."
    assert all(name.startswith(own) for name in shapes)
    assert counted is not None
    assert sum(map(prod, shapes.values())) == counted.mtp


def test_a_spec_that_is_given_other_heads_rotates_them_whole() -> None:
    spec = replace(ModelSpec.from_dict(BUILT["meta-llama/Llama-3.2-1B-Instruct"]), head_dim=16)
    assert (spec.rotary_dim, spec.has_plain_blocks) == (16, True)
    glm = ModelSpec.from_dict(MIXED["zai-org/GLM-4.5"])
    assert (glm.head_dim, glm.rotary_dim, replace(glm, experts=None).has_plain_blocks) == (128, 64, False)


def test_mimos_mtp_layer_is_a_draft_of_its_target() -> None:
    config = BUILT["XiaomiMiMo/MiMo-7B-RL"]
    draft = DraftSpec.from_dict(config, ModelSpec.from_dict(config))
    assert (draft.family, draft.in_target, draft.block.rope_theta) == ("mtp", True, 640000)


@pytest.mark.parametrize("name", DRAFTS)
def test_a_published_draft_is_computed_from_either_spelling_of_its_keys(name: str, tmp_path: Path) -> None:
    target_name, config = DRAFTS[name]
    target = ModelSpec.from_dict(BUILT[target_name])
    draft = DraftSpec.from_dict(config, target)
    assert DraftSpec.from_dict(saved_by_transformers_5(config, tmp_path, "llama"), target) == draft
    assert draft.draft_vocab_size == config.get("draft_vocab_size", config["vocab_size"])
    assert draft.block.rope_theta == config.get("rope_theta", 10000.0)


@pytest.mark.parametrize("name", SERVED)
def test_a_published_model_that_sglang_alone_computes_is_refused_with_the_way_to_serve_it(name: str) -> None:
    with pytest.raises(NotComputedError, match="--rollout-engine sglang --debug-rollout-only"):
        ModelSpec.from_dict(SERVED[name])


@pytest.mark.parametrize("name", FP8)
def test_a_published_model_in_fp8_is_computed_as_the_same_model_of_numbers(name: str) -> None:
    numbers = {key: value for key, value in FP8[name].items() if key != "quantization_config"}
    assert ModelSpec.from_dict(FP8[name]) == ModelSpec.from_dict(numbers)
    assert scheme_of(FP8[name], "config.json") == BlockScheme(128, 128)
    assert scheme_of(numbers, "config.json") is None


OTHER_FP8 = "neuralmagic/Meta-Llama-3.1-8B-Instruct-FP8"


@pytest.mark.parametrize("name", [*FP8, OTHER_FP8, MODELOPT])
def test_a_dry_run_lets_sglang_serve_it_from_its_json_files(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tokenizer(tmp_path / "model", QWEN2_5, eos_token="<|im_end|>")
    (folder / "config.json").write_text(json.dumps({**SERVED, **FP8}.get(name) or BUILT["meta-llama/Llama-3.1-8B-Instruct"]))
    if name == MODELOPT:
        described = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": []}}
        (folder / "hf_quant_config.json").write_text(json.dumps(described))
    words = f"train --dry-run --debug-rollout-only --task max4 --hf-checkpoint {folder} --output-dir {tmp_path / 'run'}"
    words += " --skip-check gpus sglang-version --sglang-dtype bfloat16"
    words += " --rollout-num-engines 1 --rollout-num-gpus-per-engine"
    assert main([*words.split(), "8", "--rollout-engine", "sglang"]) == 0
    assert "a launch would go on" in capsys.readouterr().out
    assert main([*words.split(), "0", "--rollout-engine", "embedded"]) == 2
    if name in FP8:  # whose weights are loaded here, and are not there
        assert "must hold model.safetensors" in " ".join(capsys.readouterr().out.split())
        return
    assert "serve this one with --rollout-engine sglang --debug-rollout-only" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", OTHER_WRITERS)
def test_a_draft_that_its_writer_names_or_nests_otherwise_is_the_same_draft(name: str) -> None:
    """Case draft-varieties: AngelSlim's name, and speculators' nested block."""
    same, config = OTHER_WRITERS[name]
    target = ModelSpec.from_dict(BUILT[DRAFTS[same][0]])
    assert DraftSpec.from_dict(config, target) == DraftSpec.from_dict(DRAFTS[same][1], target)
