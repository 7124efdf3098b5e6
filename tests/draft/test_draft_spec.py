"""What a draft's config.json means, and which ones are refused before a weight is read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from rollout.embedded.rope import RopeTable, rotate
from slime_spec.checkpoints.draft_choice import choose_draft
from slime_spec.checkpoints.draft_spec import DraftSpec, draft_config
from slime_spec.checkpoints.families import BY_ARCHITECTURE, nextn
from slime_spec.checkpoints.families.eagle3 import default_capture_layers
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, SpeculativeConfig
from slime_spec.draft.block import DraftAttention
from slime_spec.errors import CheckpointError, ConfigError, NotComputedError
from tests.support.tiny_drafts import EAGLE, EAGLE3, NEXTN, edit_config, make_tiny_draft, make_tiny_mimo
from tests.support.tiny_models import make_tiny_checkpoint
from tests.support.tiny_policy import make_tiny_policy

MTP_LAYERS = {
    nextn.ARCHITECTURE: nextn.OWN_LAYER,
    **{name: family.mtp for name, family in BY_ARCHITECTURE.items() if family.mtp is not None},
}
# The keys of lmsys/sglang-EAGLE3-LLaMA3.1-Instruct-8B that matter, and its target's.
LMSYS = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "draft_vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
LLAMA31 = {
    **LMSYS,
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}


def spec_of(config: dict[str, Any], target: Path, convention: str = "sglang") -> DraftSpec:
    return DraftSpec.from_dict(config, ModelSpec.from_folder(target), convention)


def refusal(config: dict[str, Any], target: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        spec_of(config, target)
    return caught.value


def test_the_published_llama31_draft_is_understood() -> None:
    spec = DraftSpec.from_dict(LMSYS, ModelSpec.from_dict(LLAMA31))
    assert spec.family == "eagle3"
    assert spec.capture_layers == (1, 15, 28)
    assert spec.block.rope_theta == 10000.0  # not the target's
    assert (spec.feature_size, spec.draft_vocab_size) == (12288, 32000)
    assert (spec.has_own_embedding, spec.has_own_head) == (False, True)
    assert (spec.logits_norm, spec.recurrent_norm) == (True, False)


def test_default_layers_are_those_before_sglangs_inputs() -> None:
    assert default_capture_layers(94) == (1, 46, 90)  # what Qwen3-235B's draft names explicitly
    assert default_capture_layers(30) == (1, 14, 26)


def test_named_layers_are_taken_from_the_lowest_up(target: Path) -> None:
    named = {"eagle_aux_hidden_state_layer_ids": [2, 0, 3]}
    assert spec_of({**EAGLE3, "eagle_config": named}, target).capture_layers == (0, 2, 3)


INPUTS = {**EAGLE3, "eagle_config": None, "eagle_aux_hidden_state_layer_ids": [1, 3, 4]}


def test_layers_named_by_their_inputs_are_those_named_by_the_outputs_before(target: Path) -> None:
    """Case draft-varieties: vLLM and speculators name at the top the layer after each captured one."""
    assert spec_of(INPUTS, target).capture_layers == (0, 2, 3)
    both = {**INPUTS, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 3]}}
    assert spec_of(both, target).capture_layers == (0, 2, 3)
    error = refusal({**INPUTS, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}}, target)
    assert error.setting.endswith(": eagle_aux_hidden_state_layer_ids")
    assert "0 to 3" in refusal({**INPUTS, "eagle_aux_hidden_state_layer_ids": [0, 1, 3]}, target).rule


def test_a_written_config_names_the_layers_for_both_engines(target: Path) -> None:
    """Case draft-varieties: vLLM took SGLang's key for its own, one layer off."""
    written = draft_config(spec_of(INPUTS, target))
    assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 3]
    assert written["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eagle_config.use_last_layernorm", False),
        ("eagle_config.use_input_layernorm_in_first_layer", False),
        ("eagle_config.use_mtp_layernorm", True),
        ("eagle_config.next_layer_regular", False),
        ("eagle_config.parallel_draft_step", 4),
        ("eagle_config.norm_before_fc", "true"),
        ("eagle_config.eagle_aux_hidden_state_layer_ids", [0, 1.0, 2]),
        ("eagle_aux_hidden_state_layer_ids", "1,2,3"),
        ("norm_before_residual", 1),
        ("norm_output", "yes"),
        ("bias", []),
        ("eagle_config", [1]),
        ("draft_vocab_size", float("nan")),
        ("target_hidden_size", -48),
        ("num_aux_hidden_states", True),
    ],
)
def test_a_key_of_the_format_that_means_nothing_here_is_refused_by_name(target: Path, key: str, value: object) -> None:
    """Case draft-varieties: ModelOpt's switches were ignored."""
    outer, _, inner = key.partition(".")
    nested = {**EAGLE3["eagle_config"], inner: value} if inner else value
    assert refusal({**EAGLE3, outer: nested}, target).setting == f"config.json: {key}"


@pytest.mark.parametrize(
    ("norm_output", "convention", "logits_norm", "recurrent_norm"),
    [
        (None, "sglang", True, False),
        (None, "specforge", True, False),
        (True, "sglang", True, True),
        (False, "sglang", True, False),
        (True, "specforge", True, False),
        (False, "specforge", False, False),
    ],
)
def test_norm_output_means_what_the_convention_says(
    target: Path, norm_output: bool | None, convention: str, logits_norm: bool, recurrent_norm: bool
) -> None:
    config = EAGLE3 if norm_output is None else {**EAGLE3, "norm_output": norm_output}
    spec = spec_of(config, target, convention)
    assert (spec.logits_norm, spec.recurrent_norm) == (logits_norm, recurrent_norm)


@pytest.mark.parametrize("config", [EAGLE3, EAGLE, NEXTN], ids=lambda config: config["architectures"][0])
def test_the_written_config_is_read_back_as_the_same_draft(target: Path, config: dict[str, Any]) -> None:
    spec = spec_of(config, target)
    for variant in (spec, replace(spec, block=replace(spec.block, rope_theta=7777.0, num_kv_heads=3))):
        assert spec_of(json.loads(json.dumps(draft_config(variant))), target) == variant


def test_every_switch_of_eagle3_survives_writing(target: Path) -> None:
    spec = spec_of({**EAGLE3, "use_aux_norm": True, "norm_before_fc": True, "bias": True, "norm_output": True}, target)
    assert (spec.fc_norm, spec.norm_before_fc, spec.fc_bias, spec.recurrent_norm) == (True, True, True, True)
    assert spec_of(draft_config(spec), target) == spec


def test_a_draft_without_its_own_vocabulary_shares_the_targets_head(target: Path) -> None:
    spec = spec_of({key: value for key, value in EAGLE3.items() if key != "draft_vocab_size"}, target)
    assert (spec.has_own_head, spec.draft_vocab_size) == (False, 131)


def test_the_table_knows_every_familys_halves_and_names() -> None:
    order = {name: family.hidden_first for name, family in MTP_LAYERS.items()}
    assert order.pop("MiMoForCausalLM")
    assert order.pop("LlamaForCausalLMNextN")
    assert not any(order.values())  # DeepSeek, GLM and Qwen3-Next put the embedding first
    names = {name: (family.prefix.format(layers=61), family.projection) for name, family in MTP_LAYERS.items()}
    assert names["MiMoForCausalLM"] == ("model.mtp_layers.0.", "input_proj.weight")
    assert names["DeepseekV3ForCausalLM"] == ("model.layers.61.", "eh_proj.weight")
    assert names["Glm4MoeForCausalLM"] == ("model.layers.61.", "eh_proj.weight")
    assert names["Qwen3NextForCausalLM"] == ("mtp.", "fc.weight")
    assert MTP_LAYERS["DeepseekV3ForCausalLM"].final_norm == "shared_head.norm.weight"
    assert MTP_LAYERS["Qwen3NextForCausalLM"].embedding_norm == "pre_fc_norm_embedding.weight"


def test_a_family_with_other_blocks_is_refused_with_the_reason(target: Path) -> None:
    error = refusal({**NEXTN, "architectures": ["Qwen3NextForCausalLM"]}, target)
    assert "experts" in error.rule
    assert "SGLang engine" in error.rule


@pytest.mark.parametrize(
    ("changes", "setting", "rule"),
    [
        ({"vocab_size": 130}, "vocab_size", "must be the target's (131)"),
        ({"target_hidden_size": 64}, "target_hidden_size", "must be the target's hidden_size (48)"),
        ({"draft_vocab_size": 200}, "draft_vocab_size", "must be from 1 to 131"),
        ({"num_aux_hidden_states": 2}, "num_aux_hidden_states", "captured layers (3: 0, 1, 2)"),
        ({"tie_word_embeddings": True, "draft_vocab_size": None}, "tie_word_embeddings", "not the target's head"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 4]}}, "layer_ids", "0 to 3"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 1]}}, "layer_ids", "different layers"),
        ({"eagle_config": {}}, "layer_ids", "by default they are"),
        ({"eagle_config": {"use_aux_hidden_state": False}, "fc_norm": True}, "fc_norm", "is read as it is"),
        (
            {"eagle_config": {"use_aux_hidden_state": False, "eagle_aux_hidden_state_layer_ids": [1]}},
            "eagle_config.eagle_aux_hidden_state_layer_ids",
            "is read as it is",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures", "must name a draft"),
        (
            {"hidden_size": 32, "target_hidden_size": 48, "draft_vocab_size": None},
            "draft_vocab_size",
            "head of its own",
        ),
    ],
)
def test_a_config_that_cannot_draft_is_refused_by_key(
    target: Path, changes: dict[str, Any], setting: str, rule: str
) -> None:
    error = refusal({**EAGLE3, **changes}, target)
    assert error.setting.endswith(setting)
    assert rule in error.rule


def test_an_mtp_checkpoint_without_mtp_layers_is_refused(tmp_path: Path) -> None:
    mimo = edit_config(make_tiny_mimo(tmp_path / "mimo"), num_nextn_predict_layers=0)
    with pytest.raises(ConfigError, match="has no MTP layer"):
        DraftSpec.from_folder(mimo, ModelSpec.from_folder(mimo))


def test_of_several_mtp_layers_none_is_taken_for_all(tmp_path: Path) -> None:
    mimo = edit_config(make_tiny_mimo(tmp_path / "mimo"), num_nextn_predict_layers=2)
    with pytest.raises(NotComputedError, match="num_nextn_predict_layers: must be 1: of several layers"):
        DraftSpec.from_folder(mimo, ModelSpec.from_folder(mimo))


@pytest.mark.parametrize(
    ("architecture", "own", "others"),
    [
        ("MiMoForCausalLM", ("model.mtp_layers.0.norm", "model.mtp_layers.12.norm"), ("model.layers.4.norm",)),
        ("DeepseekV3ForCausalLM", ("model.layers.4.norm", "model.layers.15.norm"), ("model.layers.3.norm", "lm_head")),
        ("Qwen3NextForCausalLM", ("mtp.norm", "mtp.layers.1.norm"), ("model.layers.4.norm",)),
    ],
)
def test_every_mtp_layer_of_a_checkpoint_is_known_by_its_tensors(
    architecture: str, own: tuple[str, ...], others: tuple[str, ...]
) -> None:
    layer = BY_ARCHITECTURE[architecture].mtp
    assert layer is not None
    assert all(layer.is_of_any(name, 4) for name in own)
    assert not any(layer.is_of_any(name, 4) for name in others)


def chosen(target: Path, draft: Path | None, algorithm: str = "EAGLE3", length: int | None = None, **settings: Any):  # type: ignore[no-untyped-def]
    path = None if draft is None else str(draft)
    config = Config(
        model=ModelConfig(hf_checkpoint=str(target)),
        speculative=SpeculativeConfig(algorithm=algorithm, draft_model_path=path, **settings),
        engine=EngineConfig(context_length=length),
    )
    return choose_draft(config, ModelSpec.from_folder(target))


def test_a_draft_shorter_than_the_run_is_refused_with_both_remedies(target: Path, tmp_path: Path) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target, {**EAGLE3, "max_position_embeddings": 100})
    assert chosen(target, draft, length=100).folder == draft
    with pytest.raises(ConfigError, match="must cover the run's context of 512 tokens") as caught:
        chosen(target, draft)
    assert "--sglang-context-length to 100" in caught.value.remedy
    assert "raise the draft's max_position_embeddings" in caught.value.remedy


@pytest.mark.parametrize(
    ("algorithm", "config", "fitting"),
    [("EAGLE", EAGLE3, "EAGLE3"), ("EAGLE3", EAGLE, "EAGLE"), ("EAGLE3", NEXTN, "NEXTN"), ("NEXTN", EAGLE3, "EAGLE3")],
)
def test_an_algorithm_that_does_not_fit_the_draft_is_refused_with_the_one_that_does(
    target: Path, tmp_path: Path, algorithm: str, config: dict[str, Any], fitting: str
) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target, config)
    with pytest.raises(ConfigError, match=f"must be {fitting}"):
        chosen(target, draft, algorithm)


def test_eagle_is_sglangs_name_for_a_targets_own_mtp_layer_too(tmp_path: Path) -> None:
    mimo = make_tiny_mimo(tmp_path / "mimo")
    named, unnamed = chosen(mimo, mimo, "EAGLE"), chosen(mimo, None, "EAGLE")
    assert named == unnamed == chosen(mimo, None, "NEXTN")
    assert named.spec.family == "mtp"


@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "NEXTN", "STANDALONE"])
def test_a_network_without_a_folder_is_refused(target: Path, tmp_path: Path, algorithm: str) -> None:
    with pytest.raises(ConfigError, match="must name the draft's folder"):
        chosen(target, None, algorithm)
    with pytest.raises(ConfigError, match="must be a checkpoint folder"):
        chosen(target, tmp_path / "nothing", algorithm)


def test_a_draft_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    target = make_tiny_policy(tmp_path / "target")
    twin = make_tiny_policy(tmp_path / "twin", num_hidden_layers=1)
    assert chosen(target, twin, "STANDALONE").spec.num_layers == 1
    other = make_tiny_policy(tmp_path / "other", num_hidden_layers=1)
    path = other / "tokenizer.json"
    stored = json.loads(path.read_text())
    vocab = stored["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="must hold the target's tokens: 4 differ"):
        chosen(target, other, "STANDALONE")


@pytest.mark.parametrize(
    "damage",
    [
        {"model": None},
        {"model": {"vocab": [1]}},
        {"model": {"vocab": {"a": {}}}},
        {"model": {"vocab": 3}},
        {"added_tokens": "0"},
        {"added_tokens": [{"id": 256}]},
        {"added_tokens": [{"id": [1], "content": "x"}]},
    ],
    ids=str,
)
def test_a_damaged_tokenizer_of_a_draft_is_one_error(tmp_path: Path, damage: dict[str, Any]) -> None:
    target = make_tiny_policy(tmp_path / "target")
    other = make_tiny_policy(tmp_path / "other", num_hidden_layers=1)
    path = other / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(CheckpointError, match="must hold tokens and their ids") as caught:
        chosen(target, other, "STANDALONE")
    assert caught.value.setting == str(path)


def test_standalone_models_may_pad_one_vocabulary_differently(tmp_path: Path) -> None:
    target = make_tiny_policy(tmp_path / "target", vocab_size=264)
    padded = make_tiny_policy(tmp_path / "padded", vocab_size=272, num_hidden_layers=1)
    assert chosen(target, padded, "STANDALONE").spec.vocab_size == 272
    (padded / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"must be the target's \(264\)"):
        chosen(target, padded, "STANDALONE")


def test_fp8_is_refused_on_a_cpu(target: Path, tmp_path: Path) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target, EAGLE3)
    with pytest.raises(ConfigError, match="fp8 needs a GPU"):
        chosen(target, draft, draft_model_quantization="fp8")
    assert chosen(target, draft, draft_model_quantization="int8").folder == draft


def test_a_whole_model_is_no_eagle_draft(target: Path, tmp_path: Path) -> None:
    model = make_tiny_checkpoint(tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(ConfigError, match="must name a draft"):
        chosen(target, model, "EAGLE")


def test_a_draft_that_ships_with_the_package_goes_by_its_name(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = make_tiny_draft(tmp_path / "builtin" / "tiny", target, EAGLE3)
    monkeypatch.setattr("slime_spec.checkpoints.draft_location.__file__", str(tmp_path / "draft_location.py"))
    assert chosen(target, Path("builtin:tiny")).folder == draft
    with pytest.raises(ConfigError, match="must be one of builtin:tiny") as caught:
        chosen(target, Path("builtin:tyni"))
    assert "Did you mean 'builtin:tiny'" in caught.value.remedy


def test_a_draft_with_yarn_rotates_as_transformers_does_when_it_is_served_trained_and_written(target: Path) -> None:
    """Case draft-varieties: YaRN was refused. transformers multiplies cosines and sines by attention_factor."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0}
    config = {**EAGLE3, "vocab_size": 131, "rope_theta": 10000.0, "rope_scaling": scaling}
    spec = DraftSpec.from_dict(config, ModelSpec.from_folder(target))
    block = spec.block
    theirs = LlamaConfig(
        hidden_size=block.hidden_size,
        num_attention_heads=block.num_heads,
        head_dim=block.head_dim,
        max_position_embeddings=block.max_position_embeddings,
        rope_parameters={**scaling, "rope_theta": 10000.0},
    )
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(100)[None])
    assert float(cos[0, 0, 0]) > 1.1, "the magnitude is in them"
    heads = torch.randn(100, 1, block.head_dim, generator=torch.Generator().manual_seed(0))
    expected = heads * cos[0, :, None] + rotate_half(heads) * sin[0, :, None]
    table = RopeTable(block, 100, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(rotate(heads, *table.at(torch.arange(100))), expected, atol=1e-5, rtol=1e-5)
    trained = DraftAttention(block, block.hidden_size)._rotated(heads[None], torch.arange(100)[None])[0]
    torch.testing.assert_close(trained, expected, atol=1e-5, rtol=1e-5)
    assert DraftSpec.from_dict(draft_config(spec), ModelSpec.from_folder(target)).block == block
