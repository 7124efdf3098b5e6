"""No key of a draft's config.json is passed over in silence: it is computed, refused, without effect, or told.

The keys are those of SpecForge's, speculators', AngelSlim's, ModelOpt's, DeepSpec's and EAGLE's configurations and of
what SGLang reads; each with values that a writer gives it, and some that nobody would.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_spec.checkpoints import draft_location
from slime_spec.checkpoints.config_keys import Key
from slime_spec.checkpoints.draft_keys import OF_WRITERS, unknown_keys
from slime_spec.checkpoints.draft_spec import DraftSpec, draft_config
from slime_spec.checkpoints.families import FORMAT_OF, family_of
from slime_spec.checkpoints.families.dense import WINDOW_KEYS
from slime_spec.checkpoints.families.draft_format import DRAFT_KEYS
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.rope_settings import ROPE_KEYS
from slime_spec.errors import CheckpointError
from tests.support.published_drafts import DRAFTS
from tests.support.tiny_drafts import BLOCK, DFLASH, DSPARK, EAGLE, EAGLE3

TARGET = ModelSpec.from_dict({**BLOCK, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4})
BASES = {"eagle3": EAGLE3, "eagle": EAGLE, "dflash": DFLASH, "dspark": DSPARK}
CAPTURED = "eagle_aux_hidden_state_layer_ids"
ANYTHING = (None, True, False, 0, 1, 2, -1, 0.5, "x", [], [1], {}, {"a": 1})
POOL: Mapping[str, tuple[Any, ...]] = {
    # what a network of a draft reads somewhere
    CAPTURED: ([1, 2, 3], [1, 3], [0, 1, 2]),
    "draft_vocab_size": (61, 131, 7),
    "target_hidden_size": (48, 64),
    "num_aux_hidden_states": (2, 3),
    **dict.fromkeys(("bias", "fc_norm", "use_aux_norm", "norm_before_fc", "norm_output"), (True, False)),
    **dict.fromkeys(("norm_before_residual", "attention_bias", "mlp_bias", "tie_word_embeddings"), (True, False)),
    **dict.fromkeys(("rope_is_neox_style", "is_neox_style", "use_qk_norm", "is_causal"), (True, False)),
    "eagle_config": (
        {CAPTURED: [0, 2]},
        {"use_aux_hidden_state": False},
        {CAPTURED: [0, 1, 2], "norm_before_fc": True},
        {CAPTURED: [0, 1, 2], "use_last_layernorm": False},
        {CAPTURED: [0, 1, 2], "parallel_draft_step": 4},
        {CAPTURED: [0, 1, 2], "has_lm_head": True},
    ),
    "rope_theta": (5000.0, 10000.0),
    "rope_scaling": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"type": "mrope", "mrope_section": [2, 3, 3]},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "default", "mrope_interleaved": True},
    ),
    "partial_rotary_factor": (0.5, 1.0),
    "sliding_window": (16, 512, 4096),
    "use_sliding_window": (True, False),
    "layer_types": (["full_attention"], ["sliding_attention"], ["full_attention"] * 2),
    "max_window_layers": (0, 28),
    "hidden_act": ("silu", "gelu"),
    "rms_norm_eps": (1e-6, 1e-5),
    "quantization_config": ({"quant_method": "fp8"}, {"quant_method": "awq"}),
    "logits_mup_width_multiplier": (1.0, 24.0),
    "position_embedding_type": ("rope", "yarn"),
    "eagle_decoder_type": ("llama", "kimik2"),
    "logit_scale": (1.0, 0.5),
    "embedding_multiplier": (1.0, 12.0),
    "attention_dropout": (0.0, 0.1),
    "block_size": (5, 6, 8),
    "num_target_layers": (4, 36),
    "sample_from_anchor": (True, False),
    "markov_rank": (8, 4),
    "markov_head_type": ("vanilla", "gated", "rnn", "lstm"),
    "projector_type": ("dflash", "dspark", "domino"),
    "mask_token_id": (130, 131, 3),
    "target_layer_ids": ([0, 2], [1, 2]),
    "dflash_config": (
        {"mask_token_id": 130, "target_layer_ids": [0, 2], "markov_rank": 8, "attention_sink_bias": True},
        {"mask_token_id": 130, "target_layer_ids": [0, 2], "markov_rank": 8, "gru_hidden_dim": 1024},
        {"mask_token_id": 130, "target_layer_ids": [1, 2], "markov_rank": 8, "swa_window_size": 64},
        {"mask_token_id": 130, "target_layer_ids": [0, 2], "markov_rank": 8, "conv_kernel_size": 3},
    ),
    "dspark_config": ({"markov_rank": 4}, {"markov_head_type": "rnn"}, {"noise_token_id": 3}),
    "gru_hidden_dim": (1024,),
    "emb_dim": (256,),
    "swa_window_size": (64,),
    "attention_value_scale": (0.5,),
    "has_embed_tokens": (True,),
    "num_loops": (2,),
    "enable_confidence_head": (True, False),
    "confidence_head_with_markov": (True, False),
    # what none reads
    **{name: (1, 7) for name in ("bos_token_id", "eos_token_id", "pad_token_id", "num_anchors", "image_token_id")},
    **{name: (True, False) for name in ("use_cache", "embed_requires_grad", "sliding_window_non_causal")},
    **{
        name: ("x",)
        for name in ("transformers_version", "modal_type", "target_model_type", "torch_dtype", "mask_token")
    },
    "initializer_range": (0.01, 0.02),
    "pretraining_tp": (1,),
    # what nobody has heard of
    **{name: (True, 3, "x") for name in ("norm_of_everything", "skip_first_layer", "hidden_scale")},
}


def key_of(base: Mapping[str, Any], name: str) -> Key | None:
    """The table's entry of a key, whichever table has it."""
    architecture = base["architectures"][0]
    draft_format = FORMAT_OF[architecture]
    block = family_of(draft_format.blocks[architecture]).keys
    tables = (draft_format.keys, DRAFT_KEYS, OF_WRITERS, ROPE_KEYS, block, WINDOW_KEYS)
    return next((table[name] for table in tables if name in table), None)


def is_without_effect(base: Mapping[str, Any], name: str, value: Any) -> bool:
    """Nothing reads it, or the value is the one that draft's networks of the format have anyway."""
    key = key_of(base, name)
    return key is not None and (not key.rule or (key.is_choice and key.accepts(value)))


# What a refusal may name in place of the key that was added: an object's own keys, or what contradicts it.
ALSO_NAMED = {"rope_parameters", "max_position_embeddings", "head_dim", "layer_types", "markov_rank", "mask_token_id"}
# Of these some values say what is so without them, or say with others alone what is.
DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("bias", "fc_norm", "use_aux_norm", "norm_before_fc", "norm_output"), (False,)),
    **dict.fromkeys(("norm_before_residual", "attention_bias"), (False,)),
    "rope_scaling": POOL["rope_scaling"][1:2] + POOL["rope_scaling"][3:],
    **{"rope_theta": (10000.0,), "rms_norm_eps": (1e-5,), "target_hidden_size": (48,), "num_aux_hidden_states": (3,)},
    **{"draft_vocab_size": (61,), CAPTURED: ([1, 2, 3],), "num_target_layers": (4,), "mask_token_id": (130, 131, 3)},
    **{"sliding_window": (16, 512, 4096), "use_sliding_window": (True, False), "max_window_layers": (0, 28)},
    **{"layer_types": (["full_attention"], ["full_attention"] * 2), "tie_word_embeddings": (True, False)},
    **{"target_layer_ids": POOL["target_layer_ids"], "sample_from_anchor": (True,), "markov_rank": (8, 4)},
    "is_causal": (False,),
    **{"markov_head_type": POOL["markov_head_type"][:1], "block_size": (5, 6)},
}


@pytest.mark.parametrize("kind", BASES)
@given(drawn=st.dictionaries(st.sampled_from(sorted(POOL)), st.integers(0, 99), min_size=1, max_size=3), odd=st.data())
@settings(max_examples=250, deadline=None, derandomize=True)
def test_a_key_is_computed_refused_without_effect_or_told(kind: str, drawn: dict[str, int], odd: st.DataObject) -> None:
    base = BASES[kind]
    added = {name: POOL[name][index % len(POOL[name])] for name, index in drawn.items()}
    if odd.draw(st.integers(0, 9)) == 0:
        added[odd.draw(st.sampled_from(sorted(added)))] = odd.draw(st.sampled_from(ANYTHING))
    config = {**base, **added}
    plain = DraftSpec.from_dict(base, TARGET)
    try:
        spec: DraftSpec | CheckpointError = DraftSpec.from_dict(config, TARGET)
    except CheckpointError as error:
        spec = error
    if isinstance(spec, CheckpointError):
        words = {word for word in re.split(r"[^\w]+", str(spec)) if word}
        assert words & (added.keys() | ALSO_NAMED), spec
        return
    if spec != plain:
        assert DraftSpec.from_dict(json.loads(json.dumps(draft_config(spec))), TARGET) == spec
        return
    told = {name.partition(".")[0] for name in unknown_keys(config)}
    for name, value in added.items():
        is_same = value is None or value == base.get(name) or value in DEFAULTS.get(name, ()) or value in ([], {})
        assert name in told or is_same or is_without_effect(base, name, value), (name, value)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("name", ["norm_of_everything", "skip_first_layer", "swa_window_size"])
def test_a_key_that_nobody_knows_is_told(kind: str, name: str) -> None:
    assert unknown_keys({**BASES[kind], name: 1}) == (name,)
    assert unknown_keys({**BASES[kind], name: None}) == ()


@pytest.mark.parametrize("name", DRAFTS)
def test_of_a_published_draft_every_key_is_known(name: str) -> None:
    assert unknown_keys(DRAFTS[name][1]) == ()


def test_of_what_is_written_here_every_key_is_known() -> None:
    for base in BASES.values():
        assert unknown_keys(base) == ()
        assert unknown_keys(draft_config(DraftSpec.from_dict(base, TARGET))) == ()
    shipped = [*Path(draft_location.__file__).parent.glob("builtin/*/config.json")]
    assert shipped
    assert {unknown_keys(json.loads(path.read_text())) for path in shipped} == {()}
