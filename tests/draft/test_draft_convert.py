"""A draft in another layout is the same draft: numbers, layers, vocabulary; what has no place there is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import load_draft
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.speculators import QWEN3_DEFAULTS
from slime_spec.errors import CheckpointError, ConfigError
from slime_spec.launch.draft.command import run_draft
from slime_spec.launch.draft.convert import read_any
from tests.support.published_drafts import OTHER_WRITERS
from tests.support.tiny_drafts import (
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
from tests.support.tiny_models import make_tiny_checkpoint

NESTED = EAGLE3["eagle_config"]
VARIETIES: dict[str, dict[str, Any]] = {
    "as SpecForge exports": {},
    "normed layers and their recurrence": {"fc_norm": True, "norm_output": True},
    "one norm before fc": {"eagle_config": {**NESTED, "norm_before_fc": True}},
    "a residual after its norm": {"norm_before_residual": True},
    "default layers": {"eagle_config": None},
    "a whole vocabulary": {"draft_vocab_size": 131},
    "another rotation": {"rope_theta": 500000.0},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("target") / "target", num_hidden_layers=8)


def converted(draft: Path, target: Path, out: Path, layout: str, *more: str) -> Path:
    argv = ["convert", "--draft", str(draft), "--target", str(target), "--out", str(out), "--to", layout, *more]
    assert run_draft(argv) == 0
    return out


@pytest.mark.parametrize("variety", VARIETIES)
def test_a_draft_comes_back_from_the_other_layout_as_it_was(variety: str, target: Path, tmp_path: Path) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target, {**EAGLE3, **VARIETIES[variety]})
    theirs = converted(draft, target, tmp_path / "theirs", "speculators")
    ours = converted(theirs, target, tmp_path / "ours", "sglang")
    spec = DraftSpec.from_folder(draft, ModelSpec.from_folder(target))
    back = DraftSpec.from_folder(ours, ModelSpec.from_folder(target))
    assert back == spec
    before, after = load_draft(draft, spec), load_draft(ours, back)
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())
    if before.hot_token_ids is not None:
        assert torch.equal(before.hot_token_ids, after.hot_token_ids)


def test_speculators_layout_counts_inputs_of_layers_and_nests_the_block(target: Path, tmp_path: Path) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target, {**EAGLE3, "fc_norm": True})
    theirs = converted(draft, target, tmp_path / "theirs", "speculators", "--target-name", "org/Model-8B")
    config = json.loads((theirs / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle3"
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]  # outputs of 0, 1, 2
    assert (config["fc_norm"], config["norm_before_residual"], config["draft_vocab_size"]) == (True, False, 61)
    assert config["transformer_layer_config"]["model_type"] == "llama"
    assert config["transformer_layer_config"]["hidden_size"] == 48
    assert not {"draft_vocab_size", "eagle_config", "architectures"} & config["transformer_layer_config"].keys()
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": "org/Model-8B",
        "architectures": ["LlamaForCausalLM"],
    }
    names = load_file(theirs / "model.safetensors")
    own = {
        "fc.weight",
        "layers.0.hidden_norm.weight",
        "layers.0.self_attn.q_proj.weight",
        "norm.weight",
        "lm_head.weight",
    }
    assert own <= names.keys()
    assert not any(name.startswith("midlayer.") for name in names)
    assert torch.equal(names["d2t"] + torch.arange(61), names["t2d"].nonzero().flatten())


BLOCKS: dict[str, dict[str, Any]] = {
    "dflash": DFLASH,
    "dspark": DSPARK,
    "dspark of masks alone": {**DSPARK, "block_size": 4, "sample_from_anchor": False},
    "dspark with a gated head": {**GATED, "block_size": 4, "sample_from_anchor": False},
    "dspark with a recurrent head": RECURRENT,
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_drafter_comes_back_from_the_other_layout_as_it_was(kind: str, target: Path, tmp_path: Path) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target, BLOCKS[kind])
    theirs = converted(draft, target, tmp_path / "theirs", "speculators")
    ours = converted(theirs, target, tmp_path / "ours", "sglang")
    spec = DraftSpec.from_folder(draft, ModelSpec.from_folder(target))
    assert DraftSpec.from_folder(ours, ModelSpec.from_folder(target)) == spec
    before, after = (load_file(folder / "model.safetensors") for folder in (draft, ours))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_speculators_count_a_block_with_its_root_and_have_copies_of_the_targets_tables(
    target: Path, tmp_path: Path
) -> None:
    tables = load_file(target / "model.safetensors")
    sizes = {"dflash": (6, False, 5), "dspark": (5, True, 5), "dspark of masks alone": (5, False, 4)}
    for kind, config in ((kind, BLOCKS[kind]) for kind in sizes):
        draft = make_tiny_draft(tmp_path / kind / "draft", target, config)
        theirs = converted(draft, target, tmp_path / kind / "theirs", "speculators")
        written = json.loads((theirs / "config.json").read_text())
        counted = written["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
        assert (written["block_size"], written["sample_from_anchor"], counted) == sizes[kind]
        assert written["aux_hidden_state_layer_ids"] == [1, 3]  # outputs of 0 and 2
        assert (written["mask_token_id"], written["draft_vocab_size"]) == (130, 131)
        assert (written["transformer_layer_config"]["model_type"], written.get("markov_rank")) == (
            *("qwen3", 8 if kind != "dflash" else None),
        )
        tensors = load_file(theirs / "model.safetensors")
        for name in ("embed_tokens.weight", "lm_head.weight"):
            stored = tables.get(name, tables["model.embed_tokens.weight"])
            assert torch.equal(tensors[name], stored.to(tensors[name].dtype)), name


def test_what_speculators_leaves_out_is_transformers_default() -> None:
    theirs = Qwen3Config().to_dict()
    assert {name: theirs[name] for name in QWEN3_DEFAULTS} == QWEN3_DEFAULTS


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample_from_anchor": True}, "sample_from_anchor: must be false"),
        ({"aux_hidden_state_layer_ids": None}, "must name inputs of layers"),
        ({"aux_hidden_state_layer_ids": [0, 3]}, "must name inputs of layers"),
        ({"transformer_layer_config": {"model_type": "llama"}}, "must be qwen3"),
    ],
)
def test_a_block_that_is_not_computed_is_refused_by_its_key(
    changes: dict[str, Any], said: str, target: Path, tmp_path: Path
) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target, DFLASH)
    theirs = edit_config(converted(draft, target, tmp_path / "theirs", "speculators"), **changes)
    with pytest.raises(CheckpointError, match=said):
        converted(theirs, target, tmp_path / "ours", "sglang")


def test_a_block_drafter_whose_copies_nobody_compared_is_refused_with_the_way(target: Path, tmp_path: Path) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target, DFLASH)
    theirs = converted(draft, target, tmp_path / "theirs", "speculators")
    with pytest.raises(CheckpointError, match=r"copies of the target's tables.*draft convert --to sglang"):
        DraftSpec.from_folder(theirs, ModelSpec.from_folder(target))


def test_a_recurrence_that_no_engine_begins_where_it_was_trained_is_refused(target: Path, tmp_path: Path) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target, RECURRENT)
    theirs = edit_config(converted(draft, target, tmp_path / "theirs", "speculators"), sample_from_anchor=False)
    with pytest.raises(CheckpointError, match="markov_head_type: must not be rnn beside sample_from_anchor false"):
        converted(theirs, target, tmp_path / "ours", "sglang")


def test_a_block_drafter_of_fewer_tokens_is_read_and_one_of_another_head_refused(target: Path, tmp_path: Path) -> None:
    """Their draft vocabulary is rows of the target's head: a block drafts from all of them here."""
    draft = make_tiny_draft(tmp_path / "draft", target, DFLASH)
    theirs = converted(draft, target, tmp_path / "theirs", "speculators")
    kept = torch.arange(0, 131, 2)
    edit_config(theirs, draft_vocab_size=len(kept))
    head = load_file(theirs / "model.safetensors")["lm_head.weight"]
    in_draft = torch.zeros(131, dtype=torch.bool).index_fill(0, kept, True)
    edit_tensors(theirs, lm_head__weight=head[kept].clone(), d2t=kept - torch.arange(len(kept)), t2d=in_draft)
    assert read_any(theirs, target, ModelSpec.from_folder(target)).spec == DraftSpec.from_folder(
        draft, ModelSpec.from_folder(target)
    )
    edit_tensors(theirs, lm_head__weight=head[kept] + 1)
    with pytest.raises(CheckpointError, match="must be a copy of the target's"):
        read_any(theirs, target, ModelSpec.from_folder(target))


def test_a_draft_that_its_writer_has_named_otherwise_is_known_by_what_it_is(target: Path, tmp_path: Path) -> None:
    """Cases of draft-varieties: AngelSlim's name of EAGLE-3, and an EAGLE draft that is named as its target."""
    for number, (config, other) in enumerate(((EAGLE3, "Eagle3LlamaForCausalLM"), (EAGLE, "LlamaForCausalLM"))):
        draft = make_tiny_draft(tmp_path / f"draft{number}", target, config)
        spec = DraftSpec.from_folder(draft, ModelSpec.from_folder(target))
        edit_config(draft, architectures=[other])
        out = converted(draft, target, tmp_path / f"out{number}", "sglang")
        assert DraftSpec.from_folder(out, ModelSpec.from_folder(target)) == spec


def test_pickled_tensors_are_read_and_nothing_else_in_them(target: Path, tmp_path: Path) -> None:
    """Case of draft-varieties: a draft in pytorch_model.bin alone."""
    draft = make_tiny_draft(tmp_path / "draft", target, EAGLE3)
    tensors = load_file(draft / "model.safetensors")
    (draft / "model.safetensors").unlink()
    torch.save(tensors, draft / "pytorch_model.bin")
    out = converted(draft, target, tmp_path / "out", "sglang")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(out / "model.safetensors").items())
    torch.save({"fc.weight": Path("/tmp")}, draft / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="must hold tensors"):
        converted(draft, target, tmp_path / "again", "sglang")
    assert not (tmp_path / "again").exists()


def test_published_configs_of_speculators_are_read(target: Path, tmp_path: Path) -> None:
    """Case of draft-varieties: the nested block and the flags beside it, tensors named as SpecForge names them."""
    (_, published) = OTHER_WRITERS["RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3"]
    draft = make_tiny_draft(tmp_path / "draft", target, {**EAGLE3, "eagle_config": None})
    block = {
        **published["transformer_layer_config"],
        **{k: v for k, v in EAGLE3.items() if k in ("hidden_size", "head_dim")},
    }
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    block |= {name: EAGLE3[name] for name in (*sizes, "rms_norm_eps")}
    (draft / "config.json").write_text(
        json.dumps({**published, "draft_vocab_size": 61, "transformer_layer_config": block})
    )
    spec = read_any(draft, target, ModelSpec.from_folder(target)).spec
    assert spec == DraftSpec.from_folder(draft, ModelSpec.from_folder(target))
    assert spec.capture_layers == (1, 3, 4)  # inputs of 2, n // 2, n - 3
    assert (spec.draft_vocab_size, spec.residual_norm, spec.block.num_heads) == (61, False, 6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"speculators_model_type": "mlp"}, "must be eagle3, dflash or dspark"),
        ({"transformer_layer_config": {"model_type": "qwen3"}}, "must be llama"),
    ],
)
def test_a_speculator_of_another_kind_is_refused_by_its_key(
    changes: dict[str, Any], said: str, target: Path, tmp_path: Path
) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target, EAGLE3)
    theirs = edit_config(converted(draft, target, tmp_path / "theirs", "speculators"), **changes)
    with pytest.raises(CheckpointError, match=said):
        converted(theirs, target, tmp_path / "out", "sglang")


def test_a_draft_that_has_no_place_in_the_layout_is_refused_before_anything_is_written(
    target: Path, tmp_path: Path
) -> None:
    for number, (config, said) in enumerate(
        [
            (EAGLE, "format eagle"),
            ({**EAGLE3, "bias": True}, "fc has a bias"),
            ({**EAGLE3, "draft_vocab_size": None}, "head"),
        ]
    ):
        draft = make_tiny_draft(tmp_path / f"draft{number}", target, config)
        with pytest.raises(CheckpointError, match=said):
            converted(draft, target, tmp_path / "out", "speculators")
    assert not (tmp_path / "out").exists()


def test_a_fault_is_told_of_the_drafts_own_folder(target: Path, tmp_path: Path) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target, EAGLE3)
    edit_tensors(draft, norm__weight=torch.full((48,), float("nan")))
    with pytest.raises(CheckpointError, match=f"{draft}: norm.weight"):
        converted(draft, target, tmp_path / "out", "speculators")


def test_folders_are_looked_at_first(target: Path, tmp_path: Path) -> None:
    draft = make_tiny_draft(tmp_path / "draft", target, EAGLE3)
    with pytest.raises(ConfigError, match="must be new or empty"):
        converted(draft, target, draft, "sglang")
    with pytest.raises(ConfigError, match="must be a checkpoint folder"):
        converted(tmp_path, target, tmp_path / "out", "sglang")
    with pytest.raises(ConfigError, match="convert"):
        run_draft(["convrt"])
