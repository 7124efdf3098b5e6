"""Every key of config.json that transformers acts on is computed here as transformers does, or refused by name."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_rope_utils import RopeParameters, RotaryEmbeddingConfigMixin
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from rollout.embedded.core import GenerationCore
from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.families import family_of
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.rope_settings import NESTED_KEYS
from slime_spec.errors import CheckpointError, NotComputedError
from tests.support.embedded_harness import engine_config, make_core, prefill, random_prompt
from tests.support.tiny_drafts import EAGLE, EAGLE3, NEXTN, make_tiny_mimo
from tests.support.tiny_models import LLAMA3_ROPE, MODEL_TYPES, load_reference, make_tiny_checkpoint

MODELING = {
    "LlamaForCausalLM": modeling_llama,
    "Qwen2ForCausalLM": modeling_qwen2,
    "Qwen3ForCausalLM": modeling_qwen3,
}
FAMILIES = tuple(MODELING)
# Methods of a configuration and what transformers sets itself: no keys of a file.
NO_KEYS = {"get_text_config", "base_config_key", "rope_scaling"}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 0,
    "layer_types": ["sliding_attention"] * 3,
}
LOW_ROPE = {"rope_type": "default", "rope_theta": 50.0}
# What a config.json may change: the first four are those of case audit/12, the fifth of case reports/09.
CHANGES: dict[str, dict[str, Any]] = {
    "audit/12 gelu": {"hidden_act": "gelu"},
    "audit/12 sliding window": SLIDING,
    "audit/12 partial rotary": {"partial_rotary_factor": 0.5, "rope_parameters": None},
    "audit/12 linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "reports/09 relu": {"hidden_act": "relu"},
    "swish": {"hidden_act": "swish"},
    "partial rotary within": {"rope_parameters": {**LOW_ROPE, "partial_rotary_factor": 0.5}},
    "whole rotary": {"rope_parameters": {**LOW_ROPE, "partial_rotary_factor": 1.0}},
    "theta within": {"rope_parameters": LOW_ROPE},
    "theta at the top": {"rope_parameters": None, "rope_theta": 50.0},
    "no theta at all": {"rope_parameters": None},
    "two thetas": {"rope_parameters": LOW_ROPE, "rope_theta": 70.0},
    "one theta twice": {"rope_parameters": LOW_ROPE, "rope_theta": 50.0},
    "scaling beside parameters": {"rope_parameters": LOW_ROPE, "rope_scaling": {"rope_type": "default"}},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "llama3 rope, as older versions write it": {
        "rope_parameters": None,
        "rope_theta": 50.0,
        "rope_scaling": {
            "type": "llama3",
            **{k: v for k, v in LLAMA3_ROPE.items() if k not in ("rope_type", "rope_theta")},
        },
    },
    "llama3 rope with a length outside": {"rope_parameters": LLAMA3_ROPE, "original_max_position_embeddings": 256},
    "llama3 rope without a length": {
        "rope_parameters": {k: v for k, v in LLAMA3_ROPE.items() if k != "original_max_position_embeddings"}
    },
    "yarn": {"rope_parameters": YARN},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "a rope for each kind of layer": {
        "rope_parameters": {"full_attention": LOW_ROPE},
        "layer_types": ["full_attention"] * 3,
    },
    "window alone": {"sliding_window": 8},
    "window switched on": {"use_sliding_window": True, "sliding_window": 8, "layer_types": None},
    "window of the default length": {
        "use_sliding_window": True,
        "max_window_layers": 0,
        "sliding_window": None,
        "layer_types": None,
    },
    "window behind the last layer": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 3,
        "layer_types": None,
    },
    "window over the whole context": {**SLIDING, "sliding_window": 512},
    "window without its switch": {**SLIDING, "use_sliding_window": False},
    "one windowed layer": {**SLIDING, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "full attention by name": {"layer_types": ["full_attention"] * 3},
    "chunked attention": {"attention_chunk_size": 8, "layer_types": ["chunked_attention"] * 3},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "dropout": {"attention_dropout": 0.5},
    "no causal mask": {"is_causal": False},
    "clip_qkv": {"clip_qkv": 0.1},
    "pretraining_tp": {"pretraining_tp": 2},
    "large epsilon": {"rms_norm_eps": 0.5},
    "tied, both stored": {"tie_word_embeddings": True},
    "key heads that do not divide": {"num_key_value_heads": 4},
    "odd head size": {"head_dim": 15},
    "another class": {"model_type": "llama_x"},
    "logit scaling": {"logits_scaling": 8.0, "logit_scale": 0.5, "final_logit_softcapping": 30.0},
    "multipliers": {"attention_multiplier": 0.5, "residual_multiplier": 0.2, "embedding_multiplier": 12},
    "quantised": {"quantization_config": {"quant_method": "fp8"}},
    "caches shared between layers": {"num_kv_shared_layers": 1},
    "kept aside": {
        **{
            "use_cache": False,
            "initializer_range": 0.9,
            "bos_token_id": 5,
            "pad_token_id": 5,
            "chunk_size_feed_forward": 3,
        },
        **{"output_hidden_states": True, "problem_type": "regression", "transformers_version": "9"},
        **{"id2label": {"0": "a"}, "label2id": {"a": 0}, "dtype": "bfloat16", "is_encoder_decoder": True},
        **{"a_key_that_nobody_knows": [1, {"b": None}]},
    },
}


# Changes that no family refuses.
COMPUTED = {
    *("swish", "whole rotary", "theta within", "theta at the top", "no theta at all", "one theta twice", "llama3 rope"),
    *("llama3 rope, as older versions write it", "llama3 rope without a length", "full attention by name"),
    *("window over the whole context", "pretraining_tp", "large epsilon", "kept aside"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {each: make_tiny_checkpoint(folder / each, each) for each in FAMILIES}


def changed(checkpoint: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A copy of ``checkpoint`` whose config.json has ``changes``; None removes a key."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_config_is_computed_as_transformers_does_or_refused_by_its_key(
    family: str, change: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(checkpoints[family], tmp_path / "model", CHANGES[change])
    core = loaded(folder)
    if isinstance(core, CheckpointError):
        assert change not in COMPUTED
        assert any(core.setting.rpartition(": ")[2].startswith((key, "lm_head")) for key in CHANGES[change]), core
    else:
        assert logits_equal_those_of_transformers(core, folder, random_prompt(60, seed=1))


def loaded(folder: Path) -> GenerationCore | CheckpointError:
    try:
        return make_core(engine_config(folder))
    except CheckpointError as error:
        return error


@pytest.mark.parametrize(
    ("family", "shape", "key"),
    [
        ("Qwen3ForCausalLM", {"head_dim": 128}, "head_dim"),
        (
            "Qwen2ForCausalLM",
            {"num_attention_heads": 64, "num_key_value_heads": 32, "head_dim": 2},
            "num_key_value_heads",
        ),
        ("LlamaForCausalLM", {"num_key_value_heads": 6}, "num_key_value_heads"),
        ("LlamaForCausalLM", {"num_attention_heads": 4, "head_dim": 12}, "head_dim"),
    ],
)
def test_a_key_that_is_left_out_has_the_value_of_transformers_class(
    family: str, shape: dict[str, Any], key: str, tmp_path: Path
) -> None:
    folder = changed(make_tiny_checkpoint(tmp_path / "whole", family, **shape), tmp_path / "model", {key: None})
    assert logits_equal_those_of_transformers(make_core(engine_config(folder)), folder, random_prompt(20, seed=2))


def logits_equal_those_of_transformers(core: GenerationCore, folder: Path, prompt: tuple[int, ...]) -> bool:
    core.cache.reserve((1, len(prompt)), (0, 0))
    logits = prefill(core, core.cache.own, 0, prompt)
    with torch.no_grad():
        expected = load_reference(folder)(torch.tensor([prompt])).logits[:, -1]
    return bool((logits - expected).abs().max() < 2e-4)


def read_by(*sources: object) -> Iterator[str]:
    """The attributes of a configuration that some sources read."""
    for source in sources:
        text = inspect.getsource(source)  # type: ignore[arg-type]
        yield from re.findall(r"config\.([a-z]\w*)", text)
        yield from re.findall(r"attr\((?:self\.)?\w*config, \"([a-z]\w*)\"", text)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attribute_that_transformers_reads_is_classified(family: str) -> None:
    """A newer transformers with one more key fails here: say in the family's record what the key does."""
    kind = type(AutoConfig.for_model(MODEL_TYPES[family]))
    own = {each.name for each in fields(kind) if not each.name.startswith("_")}
    read = set(read_by(MODELING[family], DynamicCache.__init__, create_causal_mask, create_sliding_window_causal_mask))
    rope = inspect.getsource(RotaryEmbeddingConfigMixin.standardize_rope_params)
    rope += inspect.getsource(RotaryEmbeddingConfigMixin.convert_rope_params_to_dict)
    of_rope = set(re.findall(r"(?:self\.|self, \"|kwargs\.(?:pop|get)\(\")([a-z]\w*)", rope))
    methods = {name for name, _ in inspect.getmembers(PreTrainedConfig, inspect.isfunction)}
    acted_on = (own | read | of_rope) - methods - NO_KEYS - {"default_theta", "ignore_keys_at_rope_validation"}
    assert {"hidden_act", "rope_parameters", "sliding_window", "attention_dropout"} <= acted_on
    assert acted_on <= family_of(family).keys.keys()
    assert RopeParameters.__annotations__.keys() <= NESTED_KEYS.keys()


NOT_A_SIZE = [0, -1, 1.5, float("nan"), float("inf"), 1e308, 10**30, True, "64", "", [64], {"a": 1}]
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "head_dim")


@pytest.mark.parametrize("value", NOT_A_SIZE, ids=repr)
@pytest.mark.parametrize("key", [*SIZES, "num_key_value_heads", "max_position_embeddings"])
def test_a_size_that_is_none_is_refused_by_its_key(
    key: str, value: object, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(checkpoints["LlamaForCausalLM"], tmp_path / "model", {key: value})
    with pytest.raises(CheckpointError) as refused:
        ModelSpec.from_folder(folder)
    assert refused.value.setting == f"{folder / 'config.json'}: {key}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rms_norm_eps", each) for each in (0, -1e-5, float("nan"), float("inf"), 2, True, "1e-5")),
        *(("rope_theta", each) for each in (0, -1, float("nan"), float("inf"), 1e300, False, "10000")),
        *(("tie_word_embeddings", each) for each in (1, "true", [1])),
        *(("rope_parameters", each) for each in ([1], "default", 3)),
        *(("layer_types", each) for each in ("full_attention", [1], {"a": 1})),
        *(("sliding_window", each) for each in (-1, "8", 1e308)),
        ("rope_parameters.factor", float("nan")),
        ("rope_parameters.low_freq_factor", 4.0),
        ("rope_parameters.original_max_position_embeddings", 0),
    ],
    ids=repr,
)
def test_a_value_of_another_kind_is_refused_by_its_key(
    key: str, value: object, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    outer, _, inner = key.partition(".")
    changes = {outer: {**LLAMA3_ROPE, inner: value} if inner else value}
    changes |= {"rope_parameters": None} if key == "rope_theta" else {}
    folder = changed(checkpoints["LlamaForCausalLM"], tmp_path / "model", changes)
    with pytest.raises(CheckpointError) as refused:
        ModelSpec.from_folder(folder)
    assert refused.value.setting == f"{folder / 'config.json'}: {key}"


DRAFTS = {"eagle3": EAGLE3, "eagle": EAGLE, "nextn": NEXTN}
OTHER_DECODERS = {
    "hidden_act": "gelu",
    "sliding_window": 8,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "quantization_config": {"quant_method": "fp8"},
    "rope_scaling": {"type": "linear", "factor": 2.0},
}


@pytest.mark.parametrize("key", OTHER_DECODERS)
@pytest.mark.parametrize("draft", [*DRAFTS, "mimo", "standalone"])
def test_drafts_and_mtp_layers_are_held_against_the_same_table(
    draft: str, key: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Case reports/09 for drafts: their keys stand for the decoder's block."""
    target, value = ModelSpec.from_folder(checkpoints["LlamaForCausalLM"]), OTHER_DECODERS[key]
    if draft == "standalone":
        folder = changed(checkpoints["LlamaForCausalLM"], tmp_path / "model", {"rope_parameters": None, key: value})
        with pytest.raises(NotComputedError):
            ModelSpec.from_folder(folder, "speculative.draft_model_path")
        return
    changes = {key: value}
    if draft == "mimo":
        config = json.loads((make_tiny_mimo(tmp_path / "mimo") / "config.json").read_text())
        changes |= {"rope_parameters": None, "layer_types": None, "max_window_layers": 0, "use_sliding_window": True}
        if key == "attention_bias":  # says of MiMo's block what that always has
            changes = {"mlp_bias": True}
    else:
        config = DRAFTS[draft]
    if key == "attention_bias" and draft in ("eagle", "eagle3"):
        # Computed: tests/draft/test_draft_varieties.py holds them to a plain reference.
        block = DraftSpec.from_dict({**config, **changes}, target).block
        assert (block.qkv_bias, block.out_bias) == (True, True)
        return
    with pytest.raises(NotComputedError):
        DraftSpec.from_dict({**config, **changes}, target)
