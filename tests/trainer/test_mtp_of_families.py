"""The MTP layers of GLM-4.5 and DeepSeek-V3 learn beside their policies, experts spread over ranks, in every layout."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slime_spec.bench.reference_trainer import near_policy, tiny_samples
from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import load_draft
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.draft_training import DraftTrainingConfig
from slime_spec.config.tree import Config, SpeculativeConfig
from slime_spec.draft.ranks import experts_of, holder_of
from tests.support.mixed_reference import mtp_logits
from tests.support.tiny_models import add_mtp_layer, load_reference
from tests.trainer.draft_reference import reference, reference_trainer
from tests.trainer.draft_workers import DraftLogits, first_gradients
from tests.trainer.mixed_policies import LAYOUTS, TP2_EP2, mixed_policy
from tests.trainer.test_draft_side import (
    SETTINGS,
    Batches,
    assert_learned_alike,
    assert_same_drafts,
    in_layout,
    published,
    ran,
    spec_of,
)
from tests.trainer.trainer_support import run_ranks, tiny_config

pytestmark = pytest.mark.proves("trainer_bridge")

FOUR_RANKS = "TP2 PP2 EP2"
NAMES = [pytest.param(name, marks=[pytest.mark.long] if name == FOUR_RANKS else []) for name in LAYOUTS]


@pytest.fixture(scope="module", params=["Glm4MoeForCausalLM", "DeepseekV3ForCausalLM"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = add_mtp_layer(mixed_policy(tmp_path_factory.mktemp(request.param), request.param))
    return replace(tiny_config(folder), speculative=SpeculativeConfig(algorithm="NEXTN"), draft_training=SETTINGS)


@pytest.fixture(scope="module")
def batches(config: Config) -> Batches:
    return [near_policy(Path(config.model.hf_checkpoint), tiny_samples(seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def learned(config: Config, batches: Batches) -> dict[str, torch.Tensor]:
    """The layer after a step, trained by features of transformers' whole passes."""
    return reference(config, batches[0])


@pytest.mark.parametrize("layout", NAMES)
def test_a_step_is_what_training_on_features_of_whole_passes_gives(
    layout: str, config: Config, batches: Batches, learned: dict[str, torch.Tensor]
) -> None:
    runs = ran(in_layout(config, dict(LAYOUTS[layout])), batches[:1])
    assert_learned_alike(published(runs), learned, config)
    assert all(run.reports == runs[0].reports for run in runs)
    report = runs[0].reports[0].draft
    assert report is not None
    assert (report.num_updates, report.num_skipped) == (2, 0)


@pytest.mark.parametrize("layout", NAMES)
def test_the_layers_logits_are_those_of_transformers_layer(layout: str, config: Config, batches: Batches) -> None:
    folder = Path(config.model.hf_checkpoint)
    laid_out = in_layout(config, dict(LAYOUTS[layout]))
    ranks: list[list[DraftLogits]] = run_ranks(laid_out.trainer.world_size, "draft_logits", laid_out, batches[0])
    found = [each for of_rank in ranks for each in of_rank]
    num_slots = SETTINGS.num_optimizer_steps * SETTINGS.batch_size
    assert sorted(slot for each in found for slot in each.slots) == list(range(num_slots))
    model = load_reference(folder)
    for reply in found:
        assert any(sample.token_ids[: len(reply.token_ids)] == reply.token_ids for sample in batches[0])
        whole = mtp_logits(folder, model, reply.token_ids)[reply.prompt_len - 1 :][: len(reply.logits)]
        torch.testing.assert_close(reply.logits, whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", NAMES)
def test_every_gradient_is_that_of_features_of_whole_passes(layout: str, config: Config, batches: Batches) -> None:
    """What tests/draft/test_mtp_families.py holds to autograd's gradients through transformers' layer."""
    config = replace(config, draft_training=replace(SETTINGS, num_optimizer_steps=1, batch_size=7, clip_grad=1e9))
    laid_out = in_layout(config, dict(LAYOUTS[layout]))
    ranks = run_ranks(laid_out.trainer.world_size, "draft_gradients", laid_out, batches[0])
    (found,) = [gradients for gradients in ranks if gradients]
    wanted = first_gradients(reference_trainer(config, batches[0]).state())
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-5 * max(float(gradient.norm()), 1e-4), name


def test_every_layout_reports_the_same(config: Config, batches: Batches) -> None:
    config = replace(config, draft_training=replace(config.draft_training, num_optimizer_steps=1, batch_size=7))
    layouts = [dict(LAYOUTS[name]) for name in ("one rank", "TP2 EP2", "DP2", "PP2")]
    first, *others = (ran(in_layout(config, each), batches[:1])[0].reports[0].draft for each in layouts)
    assert first is not None
    for report in others:
        assert report is not None
        assert report.loss == pytest.approx(first.loss, rel=1e-4)
        assert report.grad_norm == pytest.approx(first.grad_norm, rel=1e-4)
        assert report.acceptance == pytest.approx(first.acceptance, rel=1e-4)
        assert report.tokens_per_round == pytest.approx(first.tokens_per_round, rel=1e-4)


@pytest.mark.parametrize("layout", ["one rank", "TP2 EP2", "DP2 EP2 with the distributed optimizer"])
def test_the_policy_is_bit_for_bit_what_it_is_without(layout: str, config: Config, batches: Batches) -> None:
    laid_out = in_layout(config, dict(LAYOUTS[layout]))
    without = ran(replace(laid_out, draft_training=DraftTrainingConfig()), batches)
    for ours, theirs in zip(ran(laid_out, batches), without, strict=True):
        assert_same_drafts(ours.policy, theirs.policy)


def test_a_rank_whose_replies_are_none_takes_part(config: Config, batches: Batches) -> None:
    """One reply of an update, and two ranks: the other computes its experts for it alone."""
    alone = replace(config, draft_training=replace(SETTINGS, num_optimizer_steps=2, batch_size=1))
    after = published(ran(in_layout(alone, dict(LAYOUTS["DP2 EP2"])), batches[:1]))
    assert_learned_alike(after, reference(alone, batches[0]), alone)


@pytest.mark.parametrize("resumed_in", ["TP2 EP2", "one rank"])
def test_a_draft_saved_by_several_ranks_resumes_in_their_layout_and_another(
    resumed_in: str, config: Config, batches: Batches, tmp_path: Path
) -> None:
    spread = in_layout(config, dict(TP2_EP2))
    whole = published(ran(spread, [*batches, *batches]))
    ran(spread, batches, poisoned=False, save_to=str(tmp_path))
    resumed = in_layout(config, {**LAYOUTS[resumed_in], "load": str(tmp_path)})
    after = published(ran(resumed, batches))
    if resumed_in == "TP2 EP2":
        assert_same_drafts(after, whole)
    else:  # sums of another order
        for name, tensor in whole.items():
            assert (after[name] - tensor).norm() <= 1e-3 * max(float(tensor.norm()), 1.0), name


def test_an_export_has_the_layer_as_it_was_trained(config: Config, batches: Batches, tmp_path: Path) -> None:
    spread = in_layout(config, dict(TP2_EP2))
    run_ranks(2, "export_draft", spread, batches, str(tmp_path))
    spec = DraftSpec.from_folder(tmp_path / "hf", ModelSpec.from_folder(tmp_path / "hf"))
    assert_same_drafts(load_draft(tmp_path / "hf", spec).tensors, published(ran(spread, batches)))


def test_where_every_rank_publishes_each_publishes_the_whole_layer(config: Config) -> None:
    stored = load_draft(config.model.hf_checkpoint, spec_of(config)).tensors
    for pushed in run_ranks(2, "push_draft_everywhere", in_layout(config, dict(TP2_EP2))):
        assert_same_drafts(pushed, stored)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 11])
def test_every_expert_has_one_holder(size: int) -> None:
    held = [expert for rank in range(size) for expert in experts_of(rank, size, 8)]
    assert held == list(range(8))
    for rank in range(size):
        assert all(holder_of(expert, size, 8) == rank for expert in experts_of(rank, size, 8))
