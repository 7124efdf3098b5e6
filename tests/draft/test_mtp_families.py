"""Drafts of models with experts: the MTP layers learn by transformers' own gradients, and new drafts begin."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import load_draft
from slime_spec.checkpoints.families.experts import CORRECTION
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.draft.build import load_network, network_tensors, stored_name
from slime_spec.draft.network import DraftNetwork, StepNetwork
from slime_spec.draft.training.batch import collate
from slime_spec.draft.training.trainer import DraftTrainer, TrainSettings
from slime_spec.draft.unroll import Unroll
from slime_spec.launch.draft.options import read_options
from slime_spec.launch.draft.start import draft_spec
from tests.support.draft_training import make_lesson, tiny_corpus
from tests.support.mixed_reference import MtpLayer, trunk
from tests.support.tiny_models import MIXED, add_mtp_layer, load_reference, make_tiny_checkpoint
from tests.trainer.mixed_policies import by_expert

TOKENS = tuple(torch.randint(0, 131, (40,), generator=torch.Generator().manual_seed(5)).tolist())


@pytest.fixture(scope="module", params=[name for name in MIXED if name != "Qwen3MoeForCausalLM"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_mtp_layer(make_tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param))


def network_of(folder: Path) -> StepNetwork:
    spec = DraftSpec.from_folder(folder, ModelSpec.from_folder(folder))
    network = load_network(spec, load_draft(folder, spec).tensors)
    assert isinstance(network, StepNetwork)
    return network


def states(network: StepNetwork, model: PreTrainedModel) -> torch.Tensor:
    """What the head reads of every token but the last, as training unrolls it."""
    hidden, _ = trunk(model, TOKENS)
    embed = partial(F.embedding, weight=model.model.embed_tokens.weight.detach())
    unroll = Unroll(network, embed, torch.tensor([0]), len(TOKENS) - 1)
    # The last token has no state, and nothing reads one.
    return unroll.first(F.pad(hidden, (0, 0, 0, 1))[None], torch.tensor([TOKENS]))[0]


def test_the_first_step_is_transformers_decoder_layer(folder: Path) -> None:
    model = load_reference(folder)
    with torch.no_grad():
        ours = model.lm_head(states(network_of(folder), model))
        theirs = model.lm_head(MtpLayer(folder, model)(*trunk(model, TOKENS)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_every_gradient_is_autograds_through_transformers_layer(folder: Path) -> None:
    model, network = load_reference(folder), network_of(folder)
    layer = MtpLayer(folder, model)
    wanted = torch.tensor(TOKENS[2:])
    for read in (states(network, model), layer(*(each.clone() for each in trunk(model, TOKENS)))):
        F.cross_entropy(model.lm_head(read)[:-1], wanted).backward()
    own = {stored_name(network.spec, name): each.grad for name, each in network.named_parameters()}
    inner = by_expert({layer.own + name: each.grad for name, each in layer.layer.named_parameters()})
    outer = {layer.own + name.replace("/", "."): each.grad for name, each in layer.outer.items()}
    theirs = {**inner, **outer}
    assert own.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient is not None
        # An expert that no token chose has no gradient with us and zeros in a stack.
        mine = own[name] if own[name] is not None else torch.zeros_like(gradient)
        assert (mine - gradient).norm() <= 1e-5 * max(float(gradient.norm()), 1e-4), name


def test_a_routers_correction_is_loaded_and_is_no_parameter(folder: Path) -> None:
    network: DraftNetwork = network_of(folder)
    corrections = [name for name in network_tensors(network) if name.endswith(CORRECTION)]
    assert len(corrections) == 1
    assert not any(name.endswith("e_score_correction_bias") for name, _ in network.named_parameters())
    before = load_draft(folder, network.spec).tensors[corrections[0]]
    assert torch.equal(network_tensors(network)[corrections[0]], before)


@pytest.mark.parametrize("kind", ["eagle3", "eagle", "mtp", "dflash"])
@pytest.mark.parametrize("architecture", MIXED)
def test_a_new_draft_of_every_kind_begins_for_a_target_with_other_blocks(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    """The draft's own block is plain, whatever the target's; what it begins with drafts, and learns."""
    folder = make_tiny_checkpoint(tmp_path / "target", architecture, num_hidden_layers=4)
    words = ["--target", str(folder), "--out", str(tmp_path / "out"), "--kind", kind]
    target = ModelSpec.from_folder(folder)
    spec = draft_spec(read_options([*words, "--draft-vocab-size", "90"]), target)
    assert spec.block.has_plain_blocks
    lesson = make_lesson(tmp_path, folder, spec, tiny_corpus(folder, num_sequences=12), 90)
    trainer = DraftTrainer(lesson.new_model(), TrainSettings(num_steps=2, lr=3e-3), None)
    batch = collate(lesson.learned, lesson.store, torch.device("cpu"))
    losses = [trainer.step(batch).loss for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]
