"""Drafts as their writers keep them: each is read as what it means, drafts as the paper does, or is refused by its key.

The rows are the varieties of EAGLE's, SpecForge's, AngelSlim's, ModelOpt's, DeepSpec's and speculators' checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slime_spec.checkpoints.draft_choice import choose_draft
from slime_spec.checkpoints.draft_spec import DraftSpec, draft_config
from slime_spec.checkpoints.draft_tensors import draft_shapes, load_draft, save_draft_checkpoint
from slime_spec.checkpoints.embedding_rows import embeds_otherwise
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.stored import Checkpoint
from slime_spec.errors import CheckpointError, NotComputedError
from slime_spec.preflight.memory import draft_parameters
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.draft_formats import FreshDraft, TinyDraft
from tests.support.embedded_harness import make_core, random_prompt, run
from tests.support.recording_drafter import RecordingDrafter
from tests.support.tiny_drafts import (
    BLOCK,
    DFLASH,
    DSPARK,
    EAGLE,
    EAGLE3,
    GATED,
    RECURRENT,
    edit_config,
    edit_tensors,
    make_tiny_draft,
)

TARGET = ModelSpec.from_dict({**BLOCK, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4})
CAPTURED = "eagle_aux_hidden_state_layer_ids"
LAYERS = {CAPTURED: [0, 1, 2]}
MROPE = {"type": "mrope", "rope_type": "mrope", "mrope_section": [2, 3, 3]}
BIASES = {"qkv_bias": True, "out_bias": True}


def nested_by_speculators(draft: Path) -> None:
    """Write the config.json of speculators' EAGLE-3, and their tensors' names."""
    config = json.loads((draft / "config.json").read_text())
    block = {name: value for name, value in config.items() if name not in ("architectures", "draft_vocab_size")}
    theirs = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": config["draft_vocab_size"],
        CAPTURED: [1, 2, 3],
        "norm_before_residual": True,
        "transformer_layer_config": {**block, "model_type": "llama", "eagle_config": None},
    }
    (draft / "config.json").write_text(json.dumps(theirs))
    stored = load_file(draft / "model.safetensors")
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in stored.items()}
    edit_tensors(draft, **{name.replace(".", "__"): None for name in stored if name.startswith("midlayer.")})
    edit_tensors(draft, **{name.replace(".", "__"): tensor for name, tensor in renamed.items()})


def named(architecture: str) -> Callable[[Path], None]:
    def rename(draft: Path) -> None:
        edit_config(draft, architectures=[architecture])

    return rename


@dataclass(frozen=True)
class Variety:
    """A draft's config.json, what its writer made of the folder, and the draft that it is: ``base`` with changes."""

    config: dict[str, Any]
    base: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    block: dict[str, Any] = field(default_factory=dict)
    write: Callable[[Path], None] = lambda draft: None
    algorithm: str = "EAGLE3"

    @property
    def meant(self) -> DraftSpec:
        plain = DraftSpec.from_dict(self.base, TARGET)
        return replace(plain, block=replace(plain.block, **self.block), **self.fields)


def eagle3(changes: dict[str, Any], **meant: Any) -> Variety:
    return Variety({**EAGLE3, **changes}, EAGLE3, **meant)


VARIETIES: dict[str, Variety] = {
    "layers named by their outputs": eagle3({"eagle_config": {CAPTURED: [0, 2]}}, fields={"capture_layers": (0, 2)}),
    "layers named by their inputs": eagle3({"eagle_config": None, CAPTURED: [1, 3]}, fields={"capture_layers": (0, 2)}),
    "layers named both ways": eagle3(
        {"eagle_config": {CAPTURED: [0, 2]}, CAPTURED: [1, 3]}, fields={"capture_layers": (0, 2)}
    ),
    "a residual after its norm": eagle3({"norm_before_residual": True}, fields={"residual_norm": True}),
    "a norm of each layer": eagle3({"fc_norm": True}, fields={"fc_norm": True}),
    "one norm of all layers": eagle3({"norm_before_fc": True}, fields={"norm_before_fc": True}),
    "recurrence after the norm": eagle3({"norm_output": True}, fields={"recurrent_norm": True}),
    "a bias of fc": eagle3({"bias": True}, fields={"fc_bias": True}),
    "the final state alone": eagle3({"eagle_config": {"use_aux_hidden_state": False}}, fields={"capture_layers": ()}),
    "ModelOpt's keys": eagle3(
        {
            "mlp_bias": False,
            "position_embedding_type": "rope",
            "eagle_config": {
                **LAYERS,
                "use_aux_hidden_state": True,
                "use_input_layernorm_in_first_layer": True,
                "use_last_layernorm": True,
                "use_mtp_layernorm": False,
                "parallel_draft_step": 1,
            },
        }
    ),
    "biases of attention": eagle3({"attention_bias": True}, block=BIASES),
    "biases of EAGLE's attention": Variety({**EAGLE, "attention_bias": True}, EAGLE, block=BIASES, algorithm="EAGLE"),
    "biases of a block drafter's attention": Variety(
        {**DFLASH, "attention_bias": True}, DFLASH, block=BIASES, algorithm="DFLASH"
    ),
    "positions of three axes": eagle3({"rope_scaling": MROPE}),
    "a window that is off": eagle3({"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 1}),
    "AngelSlim's name": eagle3({}, write=named("Eagle3LlamaForCausalLM")),
    "EAGLE-3 named as its target": eagle3({}, write=named("LlamaForCausalLM")),
    "EAGLE named as its target": Variety(EAGLE, EAGLE, write=named("LlamaForCausalLM"), algorithm="EAGLE"),
    "EAGLE named as its Qwen2 target": Variety(
        *({**EAGLE, "architectures": ["Qwen2ForCausalLMEagle"]} for _ in range(2)),
        write=named("Qwen2ForCausalLM"),
        algorithm="EAGLE",
    ),
    "nested by speculators": eagle3({}, fields={"residual_norm": True}, write=nested_by_speculators),
    "a gated Markov head": Variety(GATED, DSPARK, fields={"markov_kind": "gated"}, algorithm="DSPARK"),
    "a recurrent Markov head": Variety(RECURRENT, DSPARK, fields={"markov_kind": "rnn"}, algorithm="DSPARK"),
    "DeepSpec's name": Variety(DSPARK, DSPARK, write=named("Qwen3DSparkModel"), algorithm="DSPARK"),
}


@pytest.mark.parametrize("name", VARIETIES)
def test_a_variety_drafts_from_the_distribution_that_it_means(name: str, target: Path, tmp_path: Path) -> None:
    variety = VARIETIES[name]
    draft = make_tiny_draft(tmp_path / "draft", target, variety.config)
    variety.write(draft)
    tiny = TinyDraft(variety.algorithm, target, target, draft)
    config = tiny.config(num_steps=3, use_rejection_sampling=True)
    chosen = choose_draft(config, ModelSpec.from_folder(target))
    assert chosen is not None
    assert chosen.spec == variety.meant
    recorder = RecordingDrafter(make_core(config).drafter)
    params = SamplingParams(max_new_tokens=10, temperature=0.7)
    run(make_core(config, drafter=recorder), [GroupRequest("g", random_prompt(9, seed=0), (0, 1), params)])
    fresh, compared = FreshDraft(tiny), 0
    for each in recorder.proposals:
        assert each.draft.q_draft is not None
        for node in range(len(each.draft.token_ids)):
            distribution = (fresh.log_distribution(each.token_ids, each.draft.token_ids[:node]) / 0.7).softmax(-1)
            torch.testing.assert_close(each.draft.q_draft[node].double(), distribution, rtol=0, atol=1e-3)
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("name", VARIETIES)
def test_a_variety_that_is_written_again_is_the_same_draft(name: str, target: Path, tmp_path: Path) -> None:
    variety, spec = VARIETIES[name], ModelSpec.from_folder(target)
    draft = make_tiny_draft(tmp_path / "draft", target, variety.config)
    variety.write(draft)
    read = load_draft(draft, DraftSpec.from_folder(draft, spec))
    save_draft_checkpoint(tmp_path / "again", read.spec, read.tensors, read.hot_token_ids)
    again = load_draft(tmp_path / "again", DraftSpec.from_folder(tmp_path / "again", spec))
    assert again.spec == read.spec == DraftSpec.from_dict(draft_config(read.spec), spec)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in read.tensors.items())


@pytest.mark.parametrize("name", VARIETIES)
def test_a_plan_counts_a_variety_from_its_config_alone(name: str, target: Path, tmp_path: Path) -> None:
    variety = VARIETIES[name]
    draft = make_tiny_draft(tmp_path / "draft", target, variety.config)
    variety.write(draft)
    checkpoint = Checkpoint.read(str(draft)).as_draft()
    counted = draft_parameters(replace(checkpoint, tensors=None))
    assert counted == pytest.approx(sum(map(prod, draft_shapes(variety.meant).values())), rel=0.03)


# What is not computed -> (the config.json, the key that the error names).
NOT_COMPUTED: dict[str, tuple[dict[str, Any], str]] = {
    "a window": ({**EAGLE3, "sliding_window": 16, "use_sliding_window": True}, "sliding_window"),
    "a window by its layer": ({**EAGLE3, "layer_types": ["sliding_attention"], "sliding_window": 16}, "layer_types"),
    "a part of a head rotated": ({**EAGLE3, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "a part rotated, by the new key": (
        {**EAGLE3, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor",
    ),
    "neighbours rotated": ({**EAGLE3, "rope_is_neox_style": False}, "rope_is_neox_style"),
    "a block's neighbours rotated": ({**DFLASH, "is_neox_style": False}, "is_neox_style"),
    "another scaling of positions": ({**EAGLE3, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type"),
    "no norm of the first input": (
        {**EAGLE3, "eagle_config": {**LAYERS, "use_input_layernorm_in_first_layer": False}},
        "eagle_config.use_input_layernorm_in_first_layer",
    ),
    "no last norm": (
        {**EAGLE3, "eagle_config": {**LAYERS, "use_last_layernorm": False}},
        "eagle_config.use_last_layernorm",
    ),
    "Kimi's block": ({**EAGLE3, "eagle_decoder_type": "kimik2"}, "eagle_decoder_type"),
    "scaled logits": ({**DSPARK, "logits_mup_width_multiplier": 24.0}, "logits_mup_width_multiplier"),
    "codes of weights": (
        {**EAGLE3, "quantization_config": {"quant_method": "compressed-tensors"}},
        "quantization_config",
    ),
    "blocks of fp8": (
        {
            **EAGLE3,
            "quantization_config": {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
            },
        },
        "quantization_config",
    ),
    "another activation": ({**EAGLE, "hidden_act": "gelu"}, "hidden_act"),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "layers counted in two ways": ({**EAGLE3, CAPTURED: [0, 1, 2]}, CAPTURED),
    "P-EAGLE": ({**EAGLE3, "architectures": ["PEagleDraftModel"]}, "architectures"),
    "speculators' P-EAGLE": (
        {"speculators_model_type": "peagle", "architectures": ["PEagleSpeculator"], "transformer_layer_config": BLOCK},
        "speculators_model_type",
    ),
    "causal blocks": ({**DFLASH, "is_causal": True}, "is_causal"),
}


@pytest.mark.parametrize("name", {**NOT_COMPUTED, **REFUSED})
def test_what_is_not_computed_is_refused_by_its_key(name: str) -> None:
    config, key = {**NOT_COMPUTED, **REFUSED}[name]
    with pytest.raises(CheckpointError) as refused:
        DraftSpec.from_dict(config, TARGET)
    assert refused.value.setting.split(": ")[1].endswith(key)
    assert isinstance(refused.value, NotComputedError) == (name in NOT_COMPUTED)


def test_pickled_tensors_are_refused_with_the_way_to_read_them(target: Path, tmp_path: Path) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target, EAGLE3)
    torch.save(load_file(draft / "model.safetensors"), draft / "pytorch_model.bin")
    (draft / "model.safetensors").unlink()
    spec = DraftSpec.from_folder(draft, ModelSpec.from_folder(target))
    with pytest.raises(CheckpointError, match=r"Convert pytorch_model\.bin: slime-spec draft convert --to sglang"):
        load_draft(draft, spec)


@pytest.mark.parametrize(
    ("change", "is_other"),
    [
        *((None, False), (lambda own: own, False), (torch.Tensor.bfloat16, False), (torch.Tensor.half, False)),
        *((lambda own: own + 0.1, True), (lambda own: own.flip(0), True), (lambda own: own[:, :24], False)),
    ],
)
def test_a_plan_sees_in_a_few_rows_that_a_draft_has_an_embedding_of_its_own(
    change: Callable[[torch.Tensor], torch.Tensor] | None, is_other: bool, target: Path, tmp_path: Path
) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target, EAGLE3)
    shared = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    if change is not None:
        edit_tensors(draft, embed_tokens__weight=change(shared).contiguous())
    assert embeds_otherwise(str(draft), str(target)) is is_other
    (draft / "model.safetensors").unlink()
    assert not embeds_otherwise(str(draft), str(target))
