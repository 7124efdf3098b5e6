"""A KL may be to another checkpoint than the policy begins with (--ref-load), of the same architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.parameters import count_parameters
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.launch.compose import composed
from slime_spec.launch.preflight import look
from slime_spec.preflight.reference import check_reference
from slime_spec.preflight.trainer_memory import trainer_memory
from slime_spec.types import TrainSample
from tests.support.tiny_models import load_reference
from tests.trainer.trainer_support import make_policy, run_ranks, tiny_config, tiny_samples


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"), "Qwen2ForCausalLM")


@pytest.fixture(scope="module")
def earlier(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    folder = make_policy(tmp_path_factory.mktemp("earlier"), "Qwen2ForCausalLM")
    generator = torch.Generator().manual_seed(7)
    tensors = load_file(folder / "model.safetensors")
    noisy = {name: each * (1.0 + 0.2 * torch.randn(each.shape, generator=generator)) for name, each in tensors.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logprobs(folder: Path, sample: TrainSample) -> torch.Tensor:
    """Of the response's tokens, by transformers, in float64."""
    ids = torch.tensor(sample.token_ids)
    with torch.no_grad():
        logits = load_reference(folder)(ids[None]).logits[0].double()
    return logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[sample.prompt_len - 1 :, 0]


def k3_of(policy: Path, reference: Path, samples: list[TrainSample]) -> float:
    """The mean over the responses' tokens of r - 1 - log r, r the reference's probability over the policy's."""
    terms = []
    for sample in samples:
        log_ratio = logprobs(reference, sample) - logprobs(policy, sample)
        terms.append(log_ratio.exp() - 1.0 - log_ratio)
    return torch.cat(terms).mean().item()


@pytest.mark.parametrize("layout", [{}, {"world_size": 2, "pipeline_model_parallel_size": 2}], ids=["one", "stages"])
def test_the_kl_is_to_the_checkpoint_that_is_named(policy: Path, earlier: Path, layout: dict[str, int]) -> None:
    """Also over stages, of which each reads its own tensors of the reference."""
    samples = tiny_samples()
    trainer = {**layout, "ref_load": str(earlier)}
    results = run_ranks(
        layout.get("world_size", 1), "train", tiny_config(policy, trainer, {"use_kl_loss": True}), [samples]
    )
    expected = k3_of(policy, earlier, samples)
    assert expected > 1e-3, "a KL of nothing would compare nothing"
    for _, (report,), _ in results:
        assert report.kl == pytest.approx(expected, rel=1e-3)


def test_without_it_the_kl_is_to_the_weights_that_the_run_begins_with(policy: Path) -> None:
    ((_, (report,), _),) = run_ranks(1, "train", tiny_config(policy, {}, {"use_kl_loss": True}), [tiny_samples()])
    assert report.kl == pytest.approx(0.0, abs=1e-6)


def with_reference(policy: Path, reference: Path) -> Config:
    return tiny_config(policy, {"ref_load": str(reference)}, {"use_kl_loss": True})


def test_the_plan_counts_a_second_copy_of_the_weights(policy: Path, earlier: Path) -> None:
    """4 bytes a value of the file, which is in float32, as the policy's own."""
    target = json.loads((policy / "config.json").read_text())
    counted = count_parameters(target)
    assert counted is not None
    (with_one,) = trainer_memory(with_reference(policy, earlier), target, counted)
    (without,) = trainer_memory(tiny_config(policy), target, counted)
    num_bytes = sum(4 * tensor.numel() for tensor in load_file(earlier / "model.safetensors").values())
    assert (with_one.reference_bytes, without.reference_bytes) == (num_bytes, 0)
    assert with_one.kept_bytes - without.kept_bytes == with_one.host_bytes - without.host_bytes == num_bytes


def test_another_architecture_is_refused_by_what_differs(policy: Path, tmp_path: Path) -> None:
    other = make_policy(tmp_path / "other", "Qwen2ForCausalLM", num_hidden_layers=2, vocab_size=192)
    with pytest.raises(ConfigError) as caught:
        check_reference(with_reference(policy, other), ModelSpec.from_folder(policy))
    assert caught.value.setting == "trainer.ref_load"
    assert "num_layers is 2 there and 4 here, vocab_size is 192 there and 160 here" in caught.value.rule
    family = make_policy(tmp_path / "family", "LlamaForCausalLM")
    with pytest.raises(ConfigError, match="architecture is LlamaForCausalLM there and Qwen2ForCausalLM here"):
        check_reference(with_reference(policy, family), ModelSpec.from_folder(policy))


def test_a_damaged_reference_is_refused_before_anything_starts(policy: Path, tmp_path: Path) -> None:
    cut = make_policy(tmp_path / "cut", "Qwen2ForCausalLM")
    tensors = load_file(cut / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, cut / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.norm\.weight"):
        check_reference(with_reference(policy, cut), ModelSpec.from_folder(policy))
    looked = look(composed(["--hf-checkpoint", str(policy), "--ref-load", str(tmp_path / "absent"), "--use-kl-loss"]))
    looked.close()
    assert [each.setting for each in looked.refusals if "absent" in str(each)] == ["trainer.ref_load"]


def test_a_reference_that_nothing_measures_is_refused_and_one_that_slime_converted_is_told(policy: Path) -> None:
    """slime would begin the policy with it: a run with other weights than asked for must not pass in silence."""
    with pytest.raises(ConfigError, match=r"trainer\.ref_load: is the reference of a KL, which this run does not"):
        composed(["--hf-checkpoint", str(policy), "--ref-load", "/data/other"])
    assert composed(["--hf-checkpoint", str(policy), "--ref-load", str(policy)]).config.trainer.ref_load == str(policy)
    made = composed(["--ref-load", "/data/Qwen3-4B_torch_dist/", "--use-kl-loss"])
    assert made.config.trainer.ref_load is None
    assert any("--ref-load /data/Qwen3-4B_torch_dist/" in note for note in made.notes)
