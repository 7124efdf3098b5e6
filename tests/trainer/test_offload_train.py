"""What the trainer keeps on a GPU that it shares, by phase; here tensors leave the CPU as they leave a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slime_spec.config.tree import ClusterConfig, Config, EngineConfig, RunConfig
from slime_spec.interfaces import RunState
from tests.trainer.trainer_support import make_policy, run_ranks, tiny_config, tiny_samples
from trainer_bridge.megatron.residency import Part, Residency

STATE = RunState(rollout_id=2, next_prompt_id=16, weight_version=1)
BATCHES = [tiny_samples(seed) for seed in (1, 2)]
ADAM = 8  # bytes of the two float32 moments
# Engines of another dtype: on a CPU, a checksum of a parameter in place would fix its storage's size for good.
ENGINE_DTYPE = "float16"
LAYOUTS = {
    "1x1 float32": {},
    "TP2 bfloat16": {"world_size": 2, "tensor_model_parallel_size": 2, "dtype": "bfloat16"},
    "DP2 bfloat16 with the distributed optimizer": {
        "world_size": 2,
        "use_distributed_optimizer": True,
        "dtype": "bfloat16",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_trainer_leaves_for_rollouts_and_trains_saves_and_pushes_as_if_it_had_stayed(
    layout: dict[str, object], tmp_path: Path
) -> None:
    folder = make_policy(tmp_path / "policy", "Qwen3ForCausalLM", tied=False)
    config = tiny_config(folder, layout, {"kl_loss_coef": 0.1})
    config = replace(config, engine=EngineConfig(dtype=ENGINE_DTYPE))
    num_ranks, saved = config.trainer.world_size, tmp_path / "saved"
    stayed = run_ranks(num_ranks, "train", config, BATCHES)
    left = run_ranks(num_ranks, "leave_between_phases", config, BATCHES, str(saved), STATE)
    for (resident, reports, pushed), (_, expected, weights) in zip(left, stayed, strict=True):
        assert reports == expected
        assert all(torch.equal(tensor, weights[name].half()) for name, tensor in pushed.items())
        nothing = dict.fromkeys(("parameters", "gradients", "optimizer", "reference"), 0)
        for phase in ("rollout", "between", "end"):
            assert resident[phase] == nothing, phase
        whole, num_parameters = resident["step"], resident["counted"]["parameters"]
        assert whole["parameters"] >= (2 if layout else 4) * num_parameters
        assert whole == resident["load"] | {"optimizer": whole["optimizer"]}
        assert whole["gradients"] >= 4 * num_parameters
        assert whole["reference"] == (2 if layout else 4) * num_parameters
        # Of bfloat16 parameters the optimizer has float32 masters; float32 parameters are counted there again.
        share = 2 if "use_distributed_optimizer" in layout else 1
        assert whole["optimizer"] == pytest.approx((ADAM + 4) * num_parameters / share, rel=0.05 * (share - 1))
        if resident.get("push"):  # the first tensor rank publishes
            in_optimizer = 0 if layout else whole["parameters"]
            assert resident["push"] == nothing | {"parameters": whole["parameters"], "optimizer": in_optimizer}
    state, after = run_ranks(num_ranks, "resume", loading(config, saved), [tiny_samples(3)])[0]
    assert state == STATE
    assert after == run_ranks(num_ranks, "train", config, [*BATCHES, tiny_samples(3)])[0][1][2:]


def loading(config: Config, folder: Path) -> Config:
    return replace(config, trainer=replace(config.trainer, load=str(folder)))


@pytest.mark.parametrize(
    ("cluster", "mode", "leaves"),
    [
        ({}, "train", True),
        ({"colocate": False}, "train", False),
        ({"offload_train": False}, "train", False),
        ({}, "train_only", False),
    ],
)
def test_only_a_trainer_that_shares_its_gpus_leaves_them(cluster: dict[str, bool], mode: str, leaves: bool) -> None:
    assert Config(run=RunConfig(mode=mode), cluster=ClusterConfig(**cluster)).trainer_leaves == leaves


def views(buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return buffer[:6].view(2, 3), buffer[6:].view(2, 3).t()


def test_views_of_one_buffer_leave_and_return_together() -> None:
    buffer = torch.arange(12, dtype=torch.bfloat16)
    first, second = views(buffer)
    residency = Residency(parts(first, second), "cpu")
    residency.hold()
    assert buffer.untyped_storage().nbytes() == 0
    kept = residency.on_host(second)
    assert torch.equal(kept, torch.arange(6, 12, dtype=torch.bfloat16).view(2, 3).t())
    residency.hold(Part.PARAMETERS)
    assert torch.equal(buffer, torch.arange(12, dtype=torch.bfloat16))
    assert residency.on_host(second) is second


def test_gradients_are_not_kept_and_what_a_step_changed_is() -> None:
    weight, gradient = torch.ones(4), torch.ones(4)
    residency = Residency(parts(weight, gradients=gradient), "cpu")
    residency.hold()
    for value in (2.0, 3.0):
        with residency.stepping():
            weight.fill_(value)
            assert gradient.untyped_storage().nbytes() == 16
        assert weight.untyped_storage().nbytes() == gradient.untyped_storage().nbytes() == 0
        residency.hold(Part.PARAMETERS)
        assert weight.tolist() == [value] * 4
        assert gradient.untyped_storage().nbytes() == 0
        residency.hold()
    assert residency.on_host(weight).tolist() == [3.0] * 4


def test_a_step_that_fails_leaves_all_the_same() -> None:
    weight = torch.ones(4)
    residency = Residency(parts(weight), "cpu")
    with pytest.raises(ArithmeticError), residency.stepping():
        raise ArithmeticError
    assert weight.untyped_storage().nbytes() == 0
    assert residency.on_host(weight).tolist() == [1.0] * 4


def test_tensors_of_another_device_stay() -> None:
    weight = torch.ones(4)
    residency = Residency(parts(weight), None)
    residency.hold()
    assert residency.held == frozenset()
    assert weight.tolist() == residency.on_host(weight).tolist() == [1.0] * 4


def parts(*parameters: torch.Tensor, gradients: torch.Tensor | None = None):
    return {
        Part.PARAMETERS: lambda: parameters,
        Part.GRADIENTS: lambda: () if gradients is None else (gradients,),
        Part.OPTIMIZER: lambda: (parameters[0],),
        Part.REFERENCE: lambda: (),
    }
