"""Drafts of a block a round (DFlash): what their config.json says, and rounds longer and shorter than a block."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from slime_spec.bench.tune.candidates import with_depth
from slime_spec.checkpoints.draft_spec import DraftSpec, draft_config
from slime_spec.checkpoints.families.dflash import default_capture_layers
from slime_spec.checkpoints.families.draft_format import DraftFamily
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.draft_training import LOSSES, DraftTrainingConfig, loss_for, rows_of_reply
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.errors import CheckpointError, ConfigError, NotComputedError
from slime_spec.launch.preflight import _check_draft_in_training, _check_mtp_layers
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.draft_formats import TinyDraft, make_format
from tests.support.embedded_harness import greedy, make_core, random_prompt, run
from tests.support.recording_drafter import RecordingDrafter
from tests.support.tiny_drafts import BLOCK, DFLASH, DSPARK, edit_tensors

TARGET = ModelSpec.from_dict({**BLOCK, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 12})
BLOCK_SIZE = DFLASH["block_size"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyDraft:
    return make_format(tmp_path_factory.mktemp("format"), "dflash")


def changed(**changes: Any) -> dict[str, Any]:
    """The config with some keys changed; ``dflash_config`` is merged, and None leaves a key out."""
    nested = {**DFLASH["dflash_config"], **changes.pop("dflash_config", {})}
    config = {**DFLASH, "dflash_config": {key: each for key, each in nested.items() if each is not None}, **changes}
    return {key: each for key, each in config.items() if each is not None}


# Of SpecForge's configs: (layers of the target, of the draft) -> target_layer_ids.
@pytest.mark.parametrize(
    ("num_target_layers", "num_layers", "layers"),
    [(24, 5, (1, 6, 11, 16, 21)), (36, 5, (1, 9, 17, 25, 33)), (64, 5, (1, 16, 31, 46, 61)), (24, 1, (12,))],
)
def test_layers_that_are_not_named_are_dflashs(
    num_target_layers: int, num_layers: int, layers: tuple[int, ...]
) -> None:
    assert default_capture_layers(num_target_layers, num_layers) == layers


def test_a_blocks_size_and_mask_stand_in_either_place() -> None:
    expected = DraftSpec.from_dict(DFLASH, TARGET)
    assert (expected.family, expected.block.num_layers, expected.block.qk_norm) == ("dflash", 2, True)
    assert (expected.block_size, expected.mask_token_id, expected.capture_layers) == (6, 130, (0, 2))
    elsewhere = changed(
        block_size=None,
        mask_token_id=130,
        target_layer_ids=[0, 2],
        dflash_config={"block_size": 6, "mask_token_id": None, "target_layer_ids": None},
    )
    assert DraftSpec.from_dict(elsewhere, TARGET) == expected
    null = changed(block_size=6) | {"dflash_config": {**DFLASH["dflash_config"], "block_size": None}}
    assert DraftSpec.from_dict(null, TARGET) == expected
    unnamed = DraftSpec.from_dict(changed(dflash_config={"target_layer_ids": None}), TARGET)
    assert unnamed.capture_layers == (1, 9)


def test_the_written_config_is_read_back_and_names_what_other_engines_read() -> None:
    spec = DraftSpec.from_dict(DFLASH, TARGET)
    written = draft_config(spec)
    assert DraftSpec.from_dict(written, TARGET) == spec
    assert written["architectures"] == ["DFlashDraftModel"]
    assert written["model_type"] == "qwen3"
    assert written["num_target_layers"] == 12  # SpecForge asks for it, whatever layers are named
    assert written["layer_types"] == ["full_attention"] * 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no block size": ({"block_size": None}, "block_size: must be given"),
    "a block of nothing to draft": ({"block_size": 1}, "block_size: must be a whole number, 2 to 128"),
    "no mask": ({"dflash_config": {"mask_token_id": None}}, "mask_token_id: must be given"),
    "a mask without an embedding": (
        {"dflash_config": {"mask_token_id": 131}},
        "must be a row of the target's embedding",
    ),
    "layers twice": (
        {"dflash_config": {"target_layer_ids": [2, 2]}},
        "must be layers of the target in ascending order",
    ),
    "layers the target lacks": ({"dflash_config": {"target_layer_ids": [0, 12]}}, "ascending order, 0 to 11"),
    "causal blocks": ({"is_causal": True}, "is_causal: must be false"),
    "another target's depth": ({"num_target_layers": 36}, "num_target_layers: must be the target's .*12"),
    "another vocabulary": ({"vocab_size": 130}, "vocab_size: must be the target's"),
    "another width": ({"hidden_size": 32}, "must be the target's hidden_size"),
}
NOT_COMPUTED: dict[str, tuple[dict[str, Any], str]] = {
    "a Domino head": ({"dflash_config": {"projector_type": "domino"}}, "dflash_config.projector_type"),
    "convolutions": ({"dflash_config": {"conv_kernel_size": 3, "conv_group_size": 8}}, "conv_kernel_size"),
    "capped logits": ({"dflash_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping"),
    "windows": (
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "use_sliding_window": True},
        "layer_types|sliding_window",
    ),
}


@pytest.mark.parametrize(("changes", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_a_config_of_no_block_is_refused_by_its_key(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        DraftSpec.from_dict(changed(**changes), TARGET)


@pytest.mark.parametrize(("changes", "says"), NOT_COMPUTED.values(), ids=NOT_COMPUTED.keys())
def test_what_is_not_computed_here_is_refused_by_its_key(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(NotComputedError, match=says):
        DraftSpec.from_dict(changed(**changes), TARGET)


@pytest.mark.parametrize("num_draft_tokens", [2, BLOCK_SIZE, 12])
def test_a_round_drafts_what_is_asked_for_as_far_as_the_block_reaches(tiny: TinyDraft, num_draft_tokens: int) -> None:
    config = tiny.config(num_draft_tokens - 1)
    recorder = RecordingDrafter(make_core(config).drafter)
    run(make_core(config, drafter=recorder), [GroupRequest("g", random_prompt(9, seed=0), (0, 1), greedy(30))])
    lengths = {
        len(each.draft.token_ids) for each in recorder.proposals if each.context.max_depth >= num_draft_tokens - 1
    }
    assert lengths == {min(num_draft_tokens, BLOCK_SIZE) - 1}


def test_contexts_that_have_no_room_together_are_gathered_one_by_one(
    tiny: TinyDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [GroupRequest(str(i), random_prompt(4 + 3 * i, seed=i), (0, 1), greedy(20)) for i in range(3)]
    drafts = []
    for most in (1 << 30, 1):
        monkeypatch.setattr("rollout.embedded.drafters.block_drafter.MOST_GATHERED_BYTES", most)
        recorder = RecordingDrafter(make_core(tiny.config(3)).drafter)
        run(make_core(tiny.config(3), drafter=recorder), requests)
        drafts.append([each.draft.token_ids for each in recorder.proposals])
    assert drafts[0] == drafts[1]


def test_numbers_that_block_drafters_do_not_read_change_nothing() -> None:
    settings = SpeculativeConfig(algorithm="DFLASH", draft_model_path="d")
    assert settings.is_automatic
    assert replace(settings, num_steps=4, eagle_topk=1).is_automatic
    assert not replace(settings, num_draft_tokens=4).is_automatic
    assert with_depth(settings, 3).num_draft_tokens == 4
    assert with_depth(settings, 3).num_steps is None


def test_a_reply_gives_as_many_fewer_rows_as_a_block_drafts_and_at_least_four_blocks() -> None:
    settings = DraftTrainingConfig(max_rows=512)
    assert [rows_of_reply(settings, drafts) for drafts in (0, 7, 15, 31, 127)] == [512, 73, 60, 124, 508]
    assert rows_of_reply(replace(settings, max_rows=8), 15) == 8


def test_a_number_of_positions_that_a_block_does_not_have_is_refused(tiny: TinyDraft) -> None:
    config, target = tiny.config(3), ModelSpec.from_folder(tiny.target)
    for num_steps in (DraftTrainingConfig().num_steps, BLOCK_SIZE - 1):
        settings = DraftTrainingConfig(enable=True, num_steps=num_steps)
        _check_draft_in_training(replace(config, draft_training=settings), target)
    settings = DraftTrainingConfig(enable=True, num_steps=2)
    with pytest.raises(ConfigError, match=r"draft_training.num_steps: has no effect .* all 5 positions.*--draft-ttt"):
        _check_draft_in_training(replace(config, draft_training=settings), target)


def test_a_number_of_mtp_layers_is_of_mtp_layers_and_is_one(tiny: TinyDraft) -> None:
    target = ModelSpec.from_folder(tiny.target)
    asked = DraftTrainingConfig(enable=True, mtp_num_layers=1)
    with pytest.raises(ConfigError, match="mtp_num_layers: is of MTP layers, and this draft is in the format dflash"):
        _check_draft_in_training(replace(tiny.config(3), draft_training=asked), target)
    layer = DraftSpec("mtp", target, target.hidden_size, target.vocab_size, hidden_first=True, recurrent_norm=True)
    _check_mtp_layers(asked, layer)
    with pytest.raises(ConfigError, match="mtp_num_layers: must be 1: one layer drafts every position"):
        _check_mtp_layers(replace(asked, mtp_num_layers=2), layer)


@pytest.mark.parametrize("family", get_args(DraftFamily))
def test_every_family_has_a_loss_to_learn_by_in_a_run(family: str) -> None:
    assert loss_for(DraftTrainingConfig(), family) in LOSSES


def test_dspark_counts_its_drafts_and_writes_what_both_engines_read() -> None:
    spec = DraftSpec.from_dict(DSPARK, TARGET)
    assert (spec.block_size, spec.num_block_drafts, spec.drafts_from_root, spec.markov_rank) == (5, 5, True, 8)
    of_masks = DraftSpec.from_dict({**DSPARK, "sample_from_anchor": False}, TARGET)
    assert (of_masks.block_size, of_masks.num_block_drafts) == (6, 5)
    for each in (spec, of_masks):
        written = draft_config(each)
        assert DraftSpec.from_dict(written, TARGET) == each
        assert written["block_size"] == 5
        assert written["dflash_config"]["projector_type"] == "dspark"
        assert written["markov_rank"] == written["dflash_config"]["markov_rank"] == 8
    with pytest.raises(CheckpointError, match="markov_rank: must be given"):
        DraftSpec.from_dict({**DSPARK, "dflash_config": DFLASH["dflash_config"]}, TARGET)
    for changes in ({"markov_head_type": "lstm"}, {"projector_type": "domino"}):
        with pytest.raises(NotComputedError, match=next(iter(changes))):
            DraftSpec.from_dict({**DSPARK, "dflash_config": {**DSPARK["dflash_config"], **changes}}, TARGET)


def test_an_embedding_of_its_own_serves_root_and_masks(tiny: TinyDraft, tmp_path: Path) -> None:
    own = make_format(tmp_path, "dflash")
    edit_tensors(own.draft, embed_tokens__weight=torch.randn(131, 48, generator=torch.Generator().manual_seed(5)))
    params = SamplingParams(max_new_tokens=20, temperature=1.0)
    drafts = []
    for each in (tiny, own):
        recorder = RecordingDrafter(make_core(each.config(3)).drafter)
        run(make_core(each.config(3), drafter=recorder), [GroupRequest("g", random_prompt(9, seed=0), (0,), params)])
        drafts.append([proposal.draft.token_ids for proposal in recorder.proposals])
    assert drafts[0] != drafts[1]
