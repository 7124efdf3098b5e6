"""Draft checkpoints are read whole or refused by name, and written as SpecForge and SGLang read them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import (
    DraftCheckpoint,
    draft_shapes,
    hot_ids_of_d2t,
    load_draft,
    save_draft_checkpoint,
    verify_draft,
    with_stored_embedding,
)
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import verify_tensors
from slime_spec.errors import CheckpointError
from tests.support.tiny_drafts import (
    DRAFT_VOCAB,
    EAGLE,
    EAGLE3,
    NEXTN,
    edit_tensors,
    make_tiny_draft,
    make_tiny_mimo,
    random_tensors,
    some_target_ids,
)


def load(folder: Path, target: Path) -> DraftCheckpoint:
    model = ModelSpec.from_folder(target)
    return load_draft(folder, DraftSpec.from_folder(folder, model))


@pytest.fixture
def eagle3(tmp_path: Path, target: Path) -> Path:
    return make_tiny_draft(tmp_path / "eagle3", target, EAGLE3)


@pytest.mark.parametrize(
    "config", [EAGLE3, {**EAGLE3, "draft_vocab_size": 131}, EAGLE, NEXTN], ids=["eagle3", "full", "eagle", "nextn"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read_back_bit_for_bit(
    tmp_path: Path, target: Path, config: dict[str, Any], dtype: torch.dtype
) -> None:
    spec = DraftSpec.from_dict(config, ModelSpec.from_folder(target))
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(draft_shapes(spec)).items()}
    ids = some_target_ids(spec) if spec.draft_vocab_size < 131 else None
    save_draft_checkpoint(tmp_path / "draft", spec, tensors, ids)
    read = load(tmp_path / "draft", target)
    assert read.spec == spec
    assert list(read.tensors) == list(draft_shapes(spec))
    for name, tensor in tensors.items():
        assert read.tensors[name].dtype == dtype
        assert torch.equal(read.tensors[name], tensor)
    assert (read.hot_token_ids is None) == (ids is None)
    if ids is not None:
        assert torch.equal(read.hot_token_ids, ids)


def test_the_file_is_what_specforge_exports_and_sglang_loads(eagle3: Path, target: Path) -> None:
    stored = load_file(eagle3 / "model.safetensors")
    assert {"fc.weight", "norm.weight", "lm_head.weight", "t2d", "d2t", "midlayer.hidden_norm.weight"} <= stored.keys()
    assert "embed_tokens.weight" not in stored
    assert stored["midlayer.self_attn.q_proj.weight"].shape == (96, 96)  # 6 heads of 16 over 2 x 48 columns
    assert stored["fc.weight"].shape == (48, 3 * 48)
    assert (stored["d2t"].dtype, stored["t2d"].dtype) == (torch.int64, torch.bool)
    # Offsets: SGLang adds the row number.
    tokens = stored["d2t"] + torch.arange(DRAFT_VOCAB)
    assert torch.equal(tokens, stored["t2d"].nonzero().squeeze(1))
    assert torch.equal(tokens, load(eagle3, target).hot_token_ids)


def test_every_name_a_tool_may_use_is_understood(tmp_path: Path, target: Path) -> None:
    config = {**EAGLE3, "fc_norm": True}
    folder = make_tiny_draft(tmp_path / "draft", target, config)
    before = load(folder, target).tensors
    stored = load_file(folder / "model.safetensors")
    old_names = {"fc_norm.0.": "aux_norm_low.", "fc_norm.1.": "aux_norm_mid.", "fc_norm.2.": "aux_norm_high."}

    def renamed(name: str) -> str:
        for new, old in {**old_names, "midlayer.": "layers.0."}.items():
            name = name.replace(new, old)
        return name if name in ("d2t", "t2d", "lm_head.weight") else f"model.{name}"

    save_file({renamed(name): tensor for name, tensor in stored.items()}, folder / "model.safetensors")
    after = load(folder, target).tensors
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_copies_of_the_targets_tensors_and_buffers_are_left_aside(tmp_path: Path, target: Path, eagle3: Path) -> None:
    copies = {"embed_tokens__weight": torch.zeros(131, 48), "midlayer__self_attn__rotary_emb__inv_freq": torch.ones(8)}
    edit_tensors(eagle3, **copies)
    assert load(eagle3, target).tensors.keys() == draft_shapes(load(eagle3, target).spec).keys()
    eagle = make_tiny_draft(tmp_path / "eagle", target, EAGLE)
    edit_tensors(eagle, lm_head__weight=torch.zeros(131, 48), embed_tokens__weight=torch.zeros(131, 48))
    assert "lm_head.weight" not in load(eagle, target).tensors


def test_a_missing_bias_of_an_eagle_draft_is_zero(tmp_path: Path, target: Path) -> None:
    eagle = make_tiny_draft(tmp_path / "eagle", target, EAGLE)
    edit_tensors(eagle, fc__bias=None)
    assert torch.equal(load(eagle, target).tensors["fc.bias"], torch.zeros(48))


def test_mimos_mtp_layer_is_read_out_of_the_targets_checkpoint(tmp_path: Path) -> None:
    mimo = make_tiny_mimo(tmp_path / "mimo")
    spec = DraftSpec.from_folder(mimo, ModelSpec.from_folder(mimo))
    read = load_draft(mimo, spec)
    assert read.tensors["model.mtp_layers.0.input_proj.weight"].shape == (48, 96)
    assert "model.mtp_layers.0.self_attn.q_proj.bias" in read.tensors
    assert all(name.startswith("model.mtp_layers.0.") for name in read.tensors)


@pytest.mark.parametrize(
    ("changes", "setting", "rule"),
    [
        ({"lm_head__weight": None}, "lm_head.weight", "must be in the draft's checkpoint"),
        ({"midlayer__mlp__up_proj__weight": None}, "midlayer.mlp.up_proj.weight", "must be in the draft's checkpoint"),
        ({"extra__weight": torch.zeros(3)}, "extra.weight", "is no tensor of this kind of draft"),
        ({"layers__1__mlp__up_proj__weight": torch.zeros(80, 48)}, "layers.1.mlp.up_proj.weight", "is no tensor"),
        ({"layers__0__hidden_norm__weight": torch.ones(48)}, "hidden_norm.weight", "must be there once"),
        ({"fc__weight": torch.zeros(48, 96)}, "fc.weight", "must have shape (48, 144)"),
        ({"norm__weight": torch.full((48,), float("nan"))}, "norm.weight", "must be finite"),
        ({"d2t": None}, "d2t", "must map the draft's reduced vocabulary"),
        ({"d2t": torch.zeros(7, dtype=torch.int64)}, "d2t", "must have shape (61,)"),
        ({"t2d": torch.zeros(7, dtype=torch.bool)}, "t2d", "must have shape (131,)"),
        ({"d2t": torch.zeros(DRAFT_VOCAB, dtype=torch.int64)}, "d2t", "must give the tokens that t2d marks"),
    ],
)
def test_a_damaged_draft_is_refused_by_the_tensors_name(
    eagle3: Path, target: Path, changes: dict[str, Any], setting: str, rule: str
) -> None:
    edit_tensors(eagle3, **changes)
    with pytest.raises(CheckpointError) as caught:
        load(eagle3, target)
    assert caught.value.setting.endswith(setting)
    assert rule in caught.value.rule
    with pytest.raises(CheckpointError) as verified:
        verify_draft(eagle3, DraftSpec.from_folder(eagle3, ModelSpec.from_folder(target)))
    assert str(verified.value) == str(caught.value)


def test_an_eagle_draft_without_its_projection_is_refused_by_the_tensors_name(tmp_path: Path, target: Path) -> None:
    eagle = make_tiny_draft(tmp_path / "eagle", target, EAGLE)
    edit_tensors(eagle, fc__weight=None, fc__bias=None)
    with pytest.raises(CheckpointError, match=r"fc\.weight: must be in the draft's checkpoint"):
        load(eagle, target)


def test_a_truncated_file_is_refused(eagle3: Path, target: Path) -> None:
    path = eagle3 / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="must be a whole safetensors file"):
        load(eagle3, target)
    path.unlink()
    with pytest.raises(CheckpointError, match="draft_model_path: must hold"):
        load(eagle3, target)


def test_d2t_is_read_as_offsets_or_as_ids_whichever_t2d_confirms() -> None:
    ids = torch.tensor([0, 1, 4, 7, 8])
    in_draft = torch.zeros(12, dtype=torch.bool)
    in_draft[ids] = True
    offsets = ids - torch.arange(5)
    assert torch.equal(hot_ids_of_d2t(offsets, in_draft, 12), ids)
    assert torch.equal(hot_ids_of_d2t(ids, in_draft, 12), ids)
    with pytest.raises(CheckpointError, match="must give the tokens that t2d marks"):
        hot_ids_of_d2t(offsets + 1, in_draft, 12)


def test_without_t2d_the_values_must_fit_one_convention_only() -> None:
    offsets = torch.tensor([0, 0, 2, 4, 4])
    assert torch.equal(hot_ids_of_d2t(offsets, None, 12), offsets + torch.arange(5))
    late = torch.tensor([0, 3, 6, 9, 11])  # as offsets they would run beyond the vocabulary
    assert torch.equal(hot_ids_of_d2t(late, None, 12), late)
    with pytest.raises(CheckpointError, match="reads as offsets and as token ids alike"):
        hot_ids_of_d2t(torch.tensor([0, 1, 2, 3, 4]), None, 12)
    with pytest.raises(CheckpointError, match="must give ascending ids below 12"):
        hot_ids_of_d2t(torch.tensor([5, 3, 9, 9, 12]), None, 12)


def test_rtp_llms_absolute_table_is_read_as_what_it_is(eagle3: Path, target: Path) -> None:
    ids = load(eagle3, target).hot_token_ids
    edit_tensors(eagle3, d2t=ids)
    assert torch.equal(load(eagle3, target).hot_token_ids, ids)


def test_the_config_says_in_which_dtype_the_weights_are(eagle3: Path, target: Path, tmp_path: Path) -> None:
    read = load(eagle3, target)
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in read.tensors.items()}
    save_draft_checkpoint(tmp_path / "half", read.spec, halves, read.hot_token_ids)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("config", [EAGLE3, EAGLE], ids=["eagle3", "eagle"])
def test_an_embedding_that_is_not_the_targets_is_used(tmp_path: Path, target: Path, config: dict[str, Any]) -> None:
    """Case draft-varieties: the draft's own embedding was taken for a copy of the target's."""
    spec = ModelSpec.from_folder(target)
    folder = make_tiny_draft(tmp_path / "draft", target, config)
    shared = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    for own, is_used in ((shared.clone(), False), (shared.half(), False), (shared + 1, True)):
        edit_tensors(folder, embed_tokens__weight=own)
        found = with_stored_embedding(folder, DraftSpec.from_folder(folder, spec), target)
        assert found.has_own_embedding is is_used
        tensors = load_draft(folder, found).tensors
        assert torch.equal(tensors["embed_tokens.weight"], own) if is_used else "embed_tokens.weight" not in tensors


def test_a_target_without_its_embedding_is_left_to_the_targets_own_check(tmp_path: Path, target: Path) -> None:
    folder, damaged = make_tiny_draft(tmp_path / "draft", target, EAGLE3), tmp_path / "damaged"
    tensors = load_file(target / "model.safetensors")
    edit_tensors(folder, embed_tokens__weight=tensors.pop("model.embed_tokens.weight") + 1)
    shutil.copytree(target, damaged)
    save_file(tensors, damaged / "model.safetensors")
    spec = ModelSpec.from_folder(damaged)
    assert not with_stored_embedding(folder, DraftSpec.from_folder(folder, spec), damaged).has_own_embedding
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight: must be in the checkpoint"):
        verify_tensors(damaged, spec)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn, torch.bool])
def test_a_draft_of_other_codes_is_refused_by_its_tensor(tmp_path: Path, target: Path, dtype: torch.dtype) -> None:
    """Case audit/05, for drafts."""
    folder = make_tiny_draft(tmp_path / "draft", target, EAGLE3)
    fc = load_file(folder / "model.safetensors")["fc.weight"]
    edit_tensors(folder, fc__weight=fc.to(dtype))
    for read in (load_draft, verify_draft):
        with pytest.raises(CheckpointError, match=r"fc\.weight: must be float32, float16 or bfloat16"):
            read(folder, DraftSpec.from_folder(folder, ModelSpec.from_folder(target)))


@pytest.mark.parametrize("table", ["d2t", "t2d"])
def test_a_table_of_the_vocabulary_holds_whole_numbers(tmp_path: Path, target: Path, table: str) -> None:
    folder = make_tiny_draft(tmp_path / "draft", target, EAGLE3)
    edit_tensors(folder, **{table: load_file(folder / "model.safetensors")[table].float()})
    with pytest.raises(CheckpointError, match=f"{table}: must hold whole numbers"):
        load(folder, target)
