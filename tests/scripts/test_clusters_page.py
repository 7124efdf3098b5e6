"""The examples for clusters: their commands are read by what they are for, and agree with the recipe that they run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from slime_spec.config.tree import Config
from slime_spec.launch.compose import compose
from tests.support.make_stand_ins import SCRIPTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return str(text)


def commands() -> Iterator[list[str]]:
    """Every run of ``slime-spec train`` on the page: the submitted one, and KubeRay's."""
    submitted = re.search(r"^ {4}ray job submit .*? -- \\\n(.*?)\n\n", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert submitted is not None
    yield shlex.split(submitted[1].replace("\\\n", " "))
    yield shlex.split(yaml.safe_load(block("yaml"))["spec"]["entrypoint"])


@pytest.fixture
def config() -> Config:
    """What the page's recipe sets."""
    return compose(["--config", "glm4.5-air-mtp"])


@pytest.mark.parametrize("command", commands())
def test_a_submitted_command_is_one_run_that_joins_ray_and_resumes(command: list[str]) -> None:
    program, name, *argv = command
    assert (program, name) == ("slime-spec", "train")
    run = compose(argv)
    assert run.cluster.ray_address == "auto"
    assert run.task.prompt_data == "/data/dapo-math-17k.jsonl"
    assert run.trainer.save == run.trainer.load
    assert run.trainer.save is not None


def test_the_rayjob_has_the_gpus_of_its_recipe_and_the_pinned_ray(config: Config) -> None:
    cluster: dict[str, Any] = yaml.safe_load(block("yaml"))["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    num_gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert num_gpus == config.cluster.num_gpus_per_node
    assert group["replicas"] * num_gpus == config.trainer.num_gpus
    needed = group["replicas"] * int(container["resources"]["limits"]["cpu"])
    assert needed >= config.trainer.world_size * config.trainer.num_cpus_per_rank
    (pinned,) = re.findall(r"(?m)^ray==(\S+)$", (ROOT / "constraints.txt").read_text())
    assert cluster["rayVersion"] == pinned


def test_the_batch_script_passes_the_gate_of_scripts_and_asks_for_its_recipes_nodes(
    config: Config, tmp_path: Path
) -> None:
    script = tmp_path / "job.sh"
    script.write_text(block("bash"))
    checked = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), str(script)], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
    asked = dict(re.findall(r"(?m)^#SBATCH --([\w-]+)=(\S+)$", script.read_text()))
    assert int(asked["nodes"]) * int(asked["gpus-per-node"]) == config.trainer.num_gpus
    last = script.read_text().replace("\\\n", " ").rstrip().splitlines()[-1]
    assert last.startswith("exec bash scripts/"), "the run takes the batch script's place, which SLURM signals"
    assert SCRIPTS[Path(shlex.split(last)[2]).name] == "glm4.5-air"
