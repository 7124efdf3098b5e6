"""How many GPUs a run may use is what the driver and CUDA_VISIBLE_DEVICES say."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime_spec.preflight.gpus import MIB, visible_gpu_bytes

TWO_GPUS = "#!/bin/sh\necho 81559\necho 81559\n"


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
