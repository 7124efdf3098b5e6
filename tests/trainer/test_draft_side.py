"""A draft learns beside the policy from the policy's own passes, in every layout, and changes nothing of the policy."""

import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slime_spec.bench.reference_trainer import near_policy, tiny_samples
from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import draft_shapes, load_draft
from slime_spec.checkpoints.families.experts import CORRECTION
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.draft_training import DraftTrainingConfig
from slime_spec.config.tree import Config, RolloutConfig, SpeculativeConfig
from slime_spec.draft.training.online import hot_token_ids
from slime_spec.preflight.draft_memory import DraftSizes, draft_memory
from slime_spec.types import TrainSample
from tests.support.tiny_drafts import edit_config, make_tiny_draft, make_tiny_mimo
from tests.trainer.draft_reference import reference
from tests.trainer.draft_workers import DraftRun
from tests.trainer.mixed_policies import DP2_EP2, TP2_EP2, mixed_policy
from tests.trainer.trainer_support import make_policy, run_ranks, tiny_config

pytestmark = pytest.mark.proves("trainer_bridge")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 160,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
EAGLE3 = {
    **SIZES,
    "architectures": ["LlamaForCausalLMEagle3"],
    "draft_vocab_size": 70,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "use_aux_hidden_state": True},
}
NEXTN = {**SIZES, "architectures": ["LlamaForCausalLMNextN"], "num_nextn_predict_layers": 1}
EAGLE = {**SIZES, "architectures": ["LlamaForCausalLMEagle"], "bias": True}
DFLASH: dict[str, Any] = {
    **SIZES,
    "architectures": ["DFlashDraftModel"],
    "num_hidden_layers": 2,
    "block_size": 4,  # as many positions as SETTINGS unroll of the others
    "dflash_config": {"mask_token_id": 150, "target_layer_ids": [0, 2]},
}
DSPARK = {
    **DFLASH,
    "architectures": ["DSparkDraftModel"],
    "block_size": 3,
    "dflash_config": {
        **DFLASH["dflash_config"],
        "projector_type": "dspark",
        "markov_rank": 8,
        "markov_head_type": "rnn",
    },
}
DRAFTS = {
    "eagle3": ("EAGLE3", EAGLE3),
    "mtp": ("NEXTN", NEXTN),
    "eagle": ("EAGLE", EAGLE),
    "dflash": ("DFLASH", DFLASH),
    "dspark": ("DSPARK", DSPARK),
}
LAYOUTS = {
    "1x1": {},
    "TP2": {"world_size": 2, "tensor_model_parallel_size": 2},
    "PP2": {"world_size": 2, "pipeline_model_parallel_size": 2},
    "DP2": {"world_size": 2},
}
# Adam moves a weight whose gradient is about zero by as much as any: where a sum's order differs, single weights do.
SETTINGS = DraftTrainingConfig(enable=True, lr=1e-3, num_optimizer_steps=2, batch_size=3, max_rows=6, dtype="float32")
Batches = Sequence[Sequence[TrainSample]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"), "Qwen2ForCausalLM", tied=True)


@pytest.fixture(scope="module", params=DRAFTS)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, policy: Path) -> Config:
    algorithm, shape = DRAFTS[request.param]
    draft = make_tiny_draft(tmp_path_factory.mktemp("draft") / "draft", policy, shape)
    speculative = SpeculativeConfig(algorithm=algorithm, draft_model_path=str(draft))
    return replace(tiny_config(policy), speculative=speculative, draft_training=SETTINGS)


@pytest.fixture(scope="module")
def batches(policy: Path) -> Batches:
    return [near_policy(policy, tiny_samples(seed)) for seed in range(2)]


def in_layout(config: Config, layout: dict[str, Any]) -> Config:
    return replace(config, trainer=replace(config.trainer, **layout))


# What the same steps gave, for the tests that ask for them again.
RAN: dict[bytes, list[DraftRun]] = {}


def ran(config: Config, batches: Batches, **options: Any) -> list[DraftRun]:
    asked = (config, list(batches), *options.values())
    key = pickle.dumps(asked)
    if key not in RAN:
        RAN[key] = run_ranks(config.trainer.world_size, "train_draft", *asked)
    return RAN[key]


def published(runs: Sequence[DraftRun]) -> dict[str, torch.Tensor]:
    """The draft, which one rank of each data parallel replica publishes."""
    with_draft = [run.draft for run in runs if run.draft]
    for other in with_draft[1:]:
        assert all(torch.equal(tensor, with_draft[0][name]) for name, tensor in other.items())
    return with_draft[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_what_training_on_features_of_whole_passes_gives(
    layout: str, config: Config, batches: Batches
) -> None:
    runs = ran(in_layout(config, LAYOUTS[layout]), batches[:1])
    assert all(run.reports == runs[0].reports for run in runs)
    assert_learned_alike(published(runs), reference(config, batches[0]), config)
    report = runs[0].reports[0].draft
    assert report is not None
    assert (report.num_updates, report.num_skipped) == (2, 0)


@pytest.mark.parametrize("layout", [{}, TP2_EP2, DP2_EP2], ids=["1x1", "TP2 EP2", "DP2 EP2"])
def test_a_draft_of_a_policy_with_experts_learns_though_each_tensor_rank_has_other_rows_of_the_states(
    layout: Mapping[str, Any], tmp_path: Path
) -> None:
    policy = mixed_policy(tmp_path / "policy", "Qwen3MoeForCausalLM")
    draft = make_tiny_draft(tmp_path / "draft", policy, EAGLE3)
    speculative = SpeculativeConfig(algorithm="EAGLE3", draft_model_path=str(draft))
    config = replace(tiny_config(policy), speculative=speculative, draft_training=SETTINGS)
    samples = near_policy(policy, tiny_samples(0))
    runs = ran(in_layout(config, dict(layout)), [samples])
    assert_learned_alike(published(runs), reference(config, samples), config)


@pytest.mark.parametrize("num_first", [1, 3], ids=["one captured layer sent", "three captured layers sent"])
def test_a_draft_learns_from_uneven_stages(num_first: int, policy: Path, batches: Batches, tmp_path: Path) -> None:
    """Of the captured layers 0, 1 and 2 the first stage has so many as it has layers, and sends them."""
    draft = make_tiny_draft(tmp_path / "draft", policy, EAGLE3)
    speculative = SpeculativeConfig(algorithm="EAGLE3", draft_model_path=str(draft))
    config = replace(tiny_config(policy), speculative=speculative, draft_training=SETTINGS)
    uneven = in_layout(config, {**LAYOUTS["PP2"], "num_layers_in_first_pipeline_stage": num_first})
    assert_learned_alike(published(ran(uneven, batches[:1])), reference(config, batches[0]), config)


def test_every_rank_and_layout_reports_the_same(config: Config, batches: Batches) -> None:
    """Of a draft before its first update: rounding then moves nothing that Adam could amplify."""
    config = replace(config, draft_training=replace(config.draft_training, num_optimizer_steps=1, batch_size=7))
    of_layouts = [[run.reports[0].draft for run in ran(in_layout(config, each), batches)] for each in LAYOUTS.values()]
    first = of_layouts[0][0]
    assert first is not None
    for reports in of_layouts:
        for report in reports:
            assert report is not None
            assert report.loss == pytest.approx(first.loss, rel=1e-4)
            assert report.grad_norm == pytest.approx(first.grad_norm, rel=1e-4)
            assert report.acceptance == pytest.approx(first.acceptance, rel=1e-4)
            assert report.accuracy == pytest.approx(first.accuracy, abs=1e-6)
            assert report.tokens_per_round == pytest.approx(first.tokens_per_round, rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_policy_is_bit_for_bit_what_it_is_without_a_draft(layout: str, config: Config, batches: Batches) -> None:
    with_draft = ran(in_layout(config, LAYOUTS[layout]), batches)
    alone = replace(config, speculative=SpeculativeConfig(), draft_training=DraftTrainingConfig())
    without = ran(in_layout(alone, LAYOUTS[layout]), batches)
    for ours, theirs in zip(with_draft, without, strict=True):
        assert ours.policy.keys() == theirs.policy.keys()
        assert all(torch.equal(tensor, theirs.policy[name]) for name, tensor in ours.policy.items())
        assert [replace(report, draft=None) for report in ours.reports] == list(theirs.reports)


def test_recomputed_activations_and_several_optimizer_steps_lose_no_row(config: Config, batches: Batches) -> None:
    recomputing = ran(in_layout(config, {"recompute": True}), batches)
    assert_same_drafts(published(recomputing), published(ran(config, batches)))
    per_group = ran(in_layout(config, {"global_batch_size": 6}), batches[:1])[0].reports[0].draft
    assert per_group is not None
    assert per_group.num_updates == 2


def assert_learned_alike(after: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: Config) -> None:
    """Each tensor moved as it should. Adam moves a weight whose gradient is about zero by as much as any other, and in
    either direction where the order of a sum differs: single weights prove nothing. A router's correction stays."""
    before = load_draft(start.speculative.draft_model_path or start.model.hf_checkpoint, spec_of(start)).tensors
    assert after.keys() == expected.keys() == before.keys()
    for name, tensor in expected.items():
        if name.endswith(CORRECTION):
            assert torch.equal(after[name], before[name]), name
            continue
        apart, moved = (after[name] - tensor).norm(), (tensor - before[name]).norm()
        assert apart <= 0.05 * moved, f"{name}: apart by {apart:.2e}, moved by {moved:.2e}"


def assert_same_drafts(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_rollouts_temperature_is_the_drafts(config: Config, batches: Batches) -> None:
    warm = replace(config, rollout=RolloutConfig(temperature=0.6))
    after, expected = published(ran(warm, batches[:1])), reference(config, batches[0], temperature=0.6)
    at_one = reference(config, batches[0])
    name = "fc.weight" if "fc.weight" in expected else "model.mtp_layers.0.input_proj.weight"
    assert (after[name] - expected[name]).abs().mean() < 0.1 * (after[name] - at_one[name]).abs().mean()


def test_a_draft_of_nan_is_left_out_and_counted_and_the_policy_goes_on(config: Config, batches: Batches) -> None:
    (run,) = ran(config, batches, poisoned=True)
    (healthy,) = ran(config, batches)
    for report in run.reports:
        assert report.draft is not None
        assert (report.draft.num_updates, report.draft.num_skipped, report.draft.grad_norm) == (0, 2, None)
    assert all(torch.equal(tensor, run.policy[name]) for name, tensor in healthy.policy.items())
    changed = [name for name, tensor in run.draft.items() if tensor.isnan().any()]
    assert len(changed) == 1, "an update that is left out changes no weight"


@pytest.mark.parametrize("layout", ["1x1", "TP2", "DP2"])
def test_a_policy_that_computes_nan_raises_its_own_error_and_teaches_nothing(
    layout: str, config: Config, batches: Batches
) -> None:
    laid_out = in_layout(config, LAYOUTS[layout])
    for problem, is_unchanged in run_ranks(laid_out.trainer.world_size, "diverged_step", laid_out, batches[0]):
        assert "optimizer step 0 has loss nan" in problem
        assert is_unchanged


def test_a_checkpoint_and_a_run_of_which_one_alone_trains_the_draft_say_so(
    config: Config, batches: Batches, tmp_path: Path
) -> None:
    without = replace(config, draft_training=DraftTrainingConfig())
    for name, saved, loaded, said in (
        ("with", config, without, "left out the checkpoint's trained draft"),
        ("without", without, config, "found no trained draft"),
    ):
        ran(saved, batches[:1], poisoned=False, save_to=str(tmp_path / name))
        (heard,) = run_ranks(1, "told_by_loading", in_layout(loaded, {"load": str(tmp_path / name)}))
        assert said in heard


def test_a_checkpoint_of_another_draft_is_refused_by_its_file(
    config: Config, batches: Batches, tmp_path: Path, policy: Path
) -> None:
    ran(config, batches[:1], poisoned=False, save_to=str(tmp_path / "saved"))
    algorithm, shape = DRAFTS["mtp" if config.speculative.algorithm == "EAGLE3" else "eagle3"]
    other = make_tiny_draft(tmp_path / "other", policy, shape)
    speculative = SpeculativeConfig(algorithm=algorithm, draft_model_path=str(other))
    loading = replace(in_layout(config, {"load": str(tmp_path / "saved")}), speculative=speculative)
    (problem,) = run_ranks(1, "told_by_loading", loading)
    assert "draft.pt" in problem
    assert "Pass the run's draft" in problem


@pytest.mark.parametrize("layout", ["1x1", pytest.param("PP2", marks=pytest.mark.long)])
def test_a_resumed_draft_goes_on_bit_for_bit(layout: str, config: Config, batches: Batches, tmp_path: Path) -> None:
    laid_out = in_layout(config, LAYOUTS[layout])
    whole = published(ran(laid_out, [*batches, *batches]))
    ran(laid_out, batches, poisoned=False, save_to=str(tmp_path))
    resumed = ran(in_layout(laid_out, {"load": str(tmp_path)}), batches)
    assert_same_drafts(published(resumed), whole)


@pytest.mark.parametrize("layout", ["1x1", "TP2"])
def test_where_every_rank_publishes_each_publishes_the_same_draft(layout: str, config: Config) -> None:
    laid_out = in_layout(config, LAYOUTS[layout])
    everywhere = run_ranks(laid_out.trainer.world_size, "push_draft_everywhere", laid_out)
    draft = load_draft(str(config.speculative.draft_model_path), spec_of(config))
    for pushed in everywhere:
        assert_same_drafts(pushed, draft.tensors)


def spec_of(config: Config) -> DraftSpec:
    target = ModelSpec.from_folder(config.model.hf_checkpoint)
    return DraftSpec.from_folder(config.speculative.draft_model_path or config.model.hf_checkpoint, target)


@pytest.mark.parametrize("layout", ["1x1", pytest.param("PP2", marks=pytest.mark.long)])
def test_an_exported_draft_is_a_checkpoint_of_what_was_trained(
    layout: str, config: Config, batches: Batches, tmp_path: Path
) -> None:
    laid_out = in_layout(config, LAYOUTS[layout])
    run_ranks(laid_out.trainer.world_size, "export_draft", laid_out, batches, str(tmp_path))
    spec = DraftSpec.from_folder(tmp_path / "draft", ModelSpec.from_folder(tmp_path / "hf"))
    exported = load_draft(tmp_path / "draft", spec)
    assert exported.tensors.keys() == draft_shapes(spec_of(config)).keys()
    assert_same_drafts(exported.tensors, published(ran(laid_out, batches)))
    was = load_draft(str(config.speculative.draft_model_path), spec_of(config))
    assert torch.equal(hot_token_ids(exported), hot_token_ids(was))


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A policy whose checkpoint has its MTP layer inside."""
    folder = make_tiny_mimo(
        tmp_path_factory.mktemp("inside"),
        **{**SIZES, "num_hidden_layers": 4, "intermediate_size": 48, "tie_word_embeddings": True},
    )
    config = replace(tiny_config(folder), speculative=SpeculativeConfig(algorithm="NEXTN"), draft_training=SETTINGS)
    return replace(config, trainer=replace(config.trainer, max_tokens_per_microbatch=64))


@pytest.mark.parametrize("layout", ["1x1", pytest.param("PP2", marks=pytest.mark.long)])
def test_an_mtp_layer_inside_the_policy_learns_as_features_of_whole_passes_say(
    layout: str, inside: Config, batches: Batches, tmp_path: Path
) -> None:
    as_qwen2 = tmp_path / "policy"
    shutil.copytree(inside.model.hf_checkpoint, as_qwen2)  # transformers does not know the policy's own model_type
    edit_config(as_qwen2, architectures=["Qwen2ForCausalLM"], model_type="qwen2", num_nextn_predict_layers=None)
    after = published(ran(in_layout(inside, LAYOUTS[layout]), batches[:1]))
    assert_learned_alike(after, reference(inside, batches[0], passes_of=as_qwen2), inside)


@pytest.mark.parametrize("layout", ["1x1", pytest.param("PP2", marks=pytest.mark.long)])
@pytest.mark.parametrize("learns", [True, False])
def test_an_export_has_the_mtp_layer_of_the_policy(
    learns: bool, layout: str, inside: Config, batches: Batches, tmp_path: Path
) -> None:
    """Without a draft in training, the layer that came with the policy: an export without is a draft that is lost."""
    wanted = inside if learns else replace(inside, draft_training=DraftTrainingConfig())
    laid_out = in_layout(wanted, LAYOUTS[layout])
    run_ranks(laid_out.trainer.world_size, "export_draft", laid_out, batches, str(tmp_path))
    assert not (tmp_path / "draft").exists()
    spec = DraftSpec.from_folder(tmp_path / "hf", ModelSpec.from_folder(tmp_path / "hf"))
    exported = load_draft(tmp_path / "hf", spec).tensors
    source = load_draft(inside.model.hf_checkpoint, spec).tensors
    assert_same_drafts(exported, published(ran(laid_out, batches)) if learns else source)
    assert all(torch.equal(tensor, source[name]) for name, tensor in exported.items()) != learns


def test_what_a_step_keeps_and_an_update_reads_is_what_the_memory_plan_says(config: Config, policy: Path) -> None:
    """Prompts of five tokens, all different, and responses of nine: a row more than the draft learns from."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 160, (6, 14), generator=generator).tolist()
    samples = [TrainSample(tuple(text), 5, (-5.0,) * 9, 1.0 + index) for index, text in enumerate(texts)]
    rollout = replace(config.rollout, batch_size=6, n_samples_per_prompt=1, max_prompt_len=5, max_response_len=9)
    settings = replace(SETTINGS, max_rows=8)  # the whole of a reply: a window would see less of what is before it
    whole = replace(config, rollout=rollout, draft_training=settings)
    (found,) = run_ranks(1, "weigh_draft_step", whole, near_policy(policy, samples))
    spec = spec_of(config)
    sizes = DraftSizes(spec.family, 0, 32, spec.feature_size, 0, spec.num_block_drafts)
    planned = draft_memory(whole, sizes)
    assert planned.num_replies == 6
    assert planned.replies_bytes == max(found.passes, found.replies)
    assert planned.inputs_bytes == found.inputs
