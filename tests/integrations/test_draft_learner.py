"""A draft learns from the passes of a policy with Megatron's parts, by slime's hook before each train step."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import load_draft
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.errors import ConfigError
from slime_spec.integrations import slime
from slime_spec.integrations.draft_learner import DraftLearner
from slime_spec.integrations.plugin import Plugin
from slime_spec.integrations.settings import PluginSettings
from tests.support.tiny_drafts import make_tiny_draft
from tests.trainer.trainer_support import make_policy

HIDDEN, VOCABULARY = 32, 160
EAGLE3: dict[str, Any] = {
    **{"hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 128},
    **{"rms_norm_eps": 1e-5, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 70},
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "use_aux_hidden_state": True},
}


class Layer(torch.nn.Module):
    """Mixes each token with the one before, and returns a tuple as Megatron's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(HIDDEN, HIDDEN)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, None]:
        before = torch.cat([torch.zeros_like(states[:1]), states[:-1]])
        return states + torch.tanh(self.linear(states + before)), None


class Embedding(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = torch.nn.Embedding(VOCABULARY, HIDDEN)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.word_embeddings(input_ids)[:, None]


class Policy(torch.nn.Module):
    """Has the parts of Megatron's GPTModel: states are [tokens, 1, hidden]."""

    share_embeddings_and_output_weights = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = Embedding()
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList(Layer() for _ in range(4))
        self.decoder.final_layernorm = torch.nn.LayerNorm(HIDDEN)
        self.output_layer = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor, loss_mask: torch.Tensor, packed_seq_params: Any = None) -> torch.Tensor:
        states = self.embedding(input_ids[0])
        for layer in self.decoder.layers:
            states, _ = layer(states)
        return self.output_layer(self.decoder.final_layernorm(states)).transpose(0, 1)


def packed(num_sequences: int = 3) -> dict[str, Any]:
    """Sequences of 5 prompt and 7 response tokens; a row's mask says whether the next token counts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (1, 12 * num_sequences), generator=generator)
    mask = torch.tensor([[0, 0, 0, 0, *[1] * 7, 0] * num_sequences])
    bounds = torch.arange(0, 12 * num_sequences + 1, 12)
    return {"input_ids": ids, "loss_mask": mask, "packed_seq_params": SimpleNamespace(cu_seqlens_q=bounds)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("drafts")
    target = make_policy(root / "target", num_hidden_layers=4)
    return str(target), str(make_tiny_draft(root / "draft", target, EAGLE3))


@pytest.fixture
def args(folders: tuple[str, str], tmp_path: Path, slime_args: Callable[..., Namespace]) -> Namespace:
    target, draft = folders
    return slime_args(
        hf_checkpoint=target,
        sglang_speculative_draft_model_path=draft,
        rollout_temperature=0.8,
        slime_spec={"learned_draft": str(tmp_path / "learned"), "draft_lr": 1e-2},
    )


def test_replies_are_what_a_pass_computes_for_the_tokens_that_count(args: Namespace) -> None:
    policy, batch = Policy(), packed()
    learner = DraftLearner(args, PluginSettings(learned_draft="unused"), [torch.nn.Sequential(), policy][1:])
    learner.before_step()
    logits = policy(**batch)[0]
    assert len(learner.replies) == 3
    for index, reply in enumerate(learner.replies):
        start = 12 * index
        assert reply.token_ids.tolist() == batch["input_ids"][0, start : start + 12].tolist()
        assert reply.prompt_len == 5
        rows = slice(start + 5, start + 11)  # fed tokens of the response: its last is predicted alone
        at_temperature = logits[rows].detach().double() / 0.8
        assert reply.argmax.tolist() == at_temperature.argmax(dim=-1).tolist()
        torch.testing.assert_close(reply.logsumexp.double(), at_temperature.logsumexp(dim=-1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reply.embeddings, policy.embedding(reply.token_ids[:-1])[:, 0].detach())
        states = policy.embedding(batch["input_ids"][0])
        captured = []
        for layer in policy.decoder.layers[:3]:
            states, _ = layer(states)
            captured.append(states[start : start + 11, 0])
        torch.testing.assert_close(reply.features, torch.cat(captured, dim=-1).detach())


def test_passes_that_only_score_show_nothing_and_no_gradient_is_touched(args: Namespace) -> None:
    policy, batch = Policy(), packed()
    learner = DraftLearner(args, PluginSettings(learned_draft="unused"), [policy])
    policy(**batch)  # before the first hook: of no step
    assert learner.replies == []
    learner.before_step()
    with torch.no_grad():
        policy(**batch)
    policy.eval()
    policy(**batch)
    policy.train()
    assert learner.replies == []
    plain = Policy()
    for each in (plain, policy):
        each(**batch).square().mean().backward()
    learner.before_step()
    assert all(
        torch.equal(mine.grad, other.grad) for mine, other in zip(policy.parameters(), plain.parameters(), strict=True)
    )


def test_the_draft_learns_and_is_written_once_a_rollout(args: Namespace, plugin: Plugin, tmp_path: Path) -> None:
    policy, batch = Policy(), packed(8)
    losses = []
    for step in range(25):
        slime.before_train_step(args, step // 8, step % 8, [policy], None, None)
        policy(**batch)
        learner = plugin._learner
        assert learner is not None
        losses.append(learner.last_loss)
    assert losses[0] is None
    assert losses[-1] < 0.75 * losses[1]
    assert losses[-1] < losses[9] < losses[1]
    folders = sorted((tmp_path / "learned").iterdir())
    assert [each.name for each in folders] == ["rollout_0", "rollout_1", "rollout_2"]
    spec = DraftSpec.from_folder(folders[-1], ModelSpec.from_folder(args.hf_checkpoint))
    written = load_draft(folders[-1], spec)
    before = load_draft(args.sglang_speculative_draft_model_path, learner.spec)
    assert torch.equal(written.hot_token_ids, before.hot_token_ids)
    now = learner.draft.tensors()
    for name, tensor in written.tensors.items():
        torch.testing.assert_close(tensor.float(), now[name].float(), rtol=1e-2, atol=1e-2)
    assert any(not torch.equal(written.tensors[name], before.tensors[name]) for name in written.tensors)


def test_the_last_rollouts_draft_has_learned_too(args: Namespace, plugin: Plugin, tmp_path: Path) -> None:
    args.num_rollout = 2
    policy, batch = Policy(), packed()
    learned: dict[str, torch.Tensor] = {}
    for step in range(6):
        slime.before_train_step(args, step // 3, step % 3, [policy], None, None)
        assert plugin._learner is not None
        learned = {name: tensor.detach().clone() for name, tensor in plugin._learner.draft.tensors().items()}
        policy(**batch)
    first, last = sorted((tmp_path / "learned").iterdir())
    assert (first.name, last.name) == ("rollout_0", "rollout_1")
    written = [load_draft(each, plugin._learner.spec).tensors for each in (first, last)]
    for name, tensor in learned.items():
        torch.testing.assert_close(written[1][name].float(), tensor.float(), rtol=1e-2, atol=1e-2)
    assert any(not torch.equal(written[0][name], written[1][name]) for name in learned)


@pytest.mark.parametrize(
    ("changed", "model", "told"),
    [
        ({"tensor_model_parallel_size": 2}, [Policy()], r"needs the whole policy on each rank.*tensor_model_parallel"),
        ({"pipeline_model_parallel_size": 2}, [Policy()], "needs the whole policy on each rank"),
        ({"context_parallel_size": 2}, [Policy()], "needs the whole policy on each rank"),
        ({}, [Policy(), Policy()], "not virtual pipeline stages"),
        ({}, [torch.nn.Linear(2, 2)], "no embedding and no decoder and no output_layer"),
        ({"sglang_speculative_draft_model_path": None}, [Policy()], r"MTP layers learn by slime's --enable-mtp"),
        ({"slime_spec": {}}, [Policy()], "must be set for before_train_step"),
    ],
)
def test_what_a_rank_cannot_know_is_refused(
    changed: dict[str, Any], model: list[Any], told: str, args: Namespace, plugin: Plugin
) -> None:
    vars(args).update(changed)
    with pytest.raises(ConfigError, match=told):
        slime.before_train_step(args, 0, 0, model, None, None)
