"""Which GPUs a run may use, and what they can do, is what the driver and CUDA_VISIBLE_DEVICES say."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime_spec.launch.compose import composed
from slime_spec.launch.preflight import look
from slime_spec.preflight.gpus import MIB, visible_gpu_bytes, visible_gpu_capabilities
from tests.support.fp8_checkpoints import store_in_fp8
from tests.support.tiny_drafts import EAGLE3, make_tiny_draft
from tests.support.tiny_policy import make_tiny_policy

TWO_GPUS = "#!/bin/sh\necho 81559\necho 81559\n"


def two_gpus_of(capability: str) -> str:
    return f'#!/bin/sh\ncase $1 in *compute_cap) x="{capability}";; *) x=81559;; esac\necho "$x"\necho "$x"\n'


@pytest.mark.parametrize(
    ("environ", "num_gpus"),
    [
        ({}, 2),
        ({"CUDA_VISIBLE_DEVICES": "1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "GPU-5ebe9f43,GPU-ac33420d"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
    ],
)
def test_gpus_are_those_of_the_driver_that_the_environment_leaves(
    environ: dict[str, str], num_gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text(TWO_GPUS)
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpu_bytes(environ) == (81559 * MIB,) * num_gpus


def test_without_a_driver_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("slime_spec.preflight.gpus.AMD_DRIVER", tmp_path / "kfd")
    assert visible_gpu_bytes({}) == ()
    (tmp_path / "kfd").touch()
    assert visible_gpu_bytes({}) is None


@pytest.mark.parametrize(
    ("answer", "environ", "expected"),
    [
        ("9.0", {}, ((9, 0), (9, 0))),
        ("8.6", {"CUDA_VISIBLE_DEVICES": "1"}, ((8, 6),)),
        ("12.0", {"CUDA_VISIBLE_DEVICES": ""}, ()),
        ('Field "compute_cap" is not a valid field to query.', {}, ()),
        ("[N/A]", {}, ()),
    ],
)
def test_capabilities_are_those_that_the_driver_tells(
    answer: str,
    environ: dict[str, str],
    expected: tuple[tuple[int, int], ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text(two_gpus_of(answer.replace('"', "'")))
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert visible_gpu_capabilities(environ) == expected


def with_gpus_of(capability: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine have two GPUs, by a driver in ``folder``."""
    driver = folder / "nvidia-smi"
    driver.write_text(two_gpus_of(capability))
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(("capability", "says"), [("8.0", "fp8 on a GPU of 8.0"), ("9.0", None)])
def test_a_draft_in_fp8_is_refused_where_this_machines_gpus_have_none(
    capability: str, says: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the preflight, which the launch, the dry run and the doctor share; a cluster's GPUs are judged there."""
    with_gpus_of(capability, tmp_path, monkeypatch)
    policy = make_tiny_policy(tmp_path / "policy", max_position_embeddings=4096)
    draft = make_tiny_draft(tmp_path / "draft", policy, {**EAGLE3, "vocab_size": 257, "max_position_embeddings": 4096})
    argv = ["--hf-checkpoint", str(policy), "--rollout-num-gpus-per-engine", "1", "--actor-num-gpus", "1"]
    argv += ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(draft)]
    argv += ["--speculative-draft-model-quantization", "fp8"]
    refused = [str(each) for each in look(composed(argv)).refusals]
    assert [says in each for each in refused] == ([True] if says else []), refused
    assert look(composed([*argv, "--ray-address", "10.0.0.1:6379"])).refusals == ()


@pytest.mark.parametrize(
    ("capability", "says"), [("8.0", "a GPU of 8.0"), ("8.9", None), ("9.0", None), ("10.0", "a GPU of 10.0")]
)
def test_pushes_of_fp8_are_refused_on_gpus_whose_servers_keep_another_layout(
    capability: str, says: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus_of(capability, tmp_path, monkeypatch)
    policy = store_in_fp8(make_tiny_policy(tmp_path / "policy", max_position_embeddings=4096))
    argv = ["--hf-checkpoint", str(policy), "--rollout-num-gpus-per-engine", "1", "--actor-num-gpus", "1"]
    argv += ["--rollout-engine", "sglang", "--skip-check", "sglang-version"]
    refused = [str(each) for each in look(composed(argv)).refusals]
    assert [says in each for each in refused] == ([True] if says else []), refused
    for other in (["--ray-address", "10.0.0.1:6379"], ["--debug-rollout-only"], ["--rollout-engine", "embedded"]):
        assert look(composed([*argv, *other])).refusals == ()
