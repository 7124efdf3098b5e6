"""The launch scripts on tiny checkpoints of the formats they name: every plan, and what runs without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from slime_spec.metrics.jsonl import read_metrics
from tests.support.fp8_checkpoints import store_in_fp8
from tests.support.launched import run_in_process
from tests.support.make_stand_ins import SCRIPTS, STAND_INS, StandIn
from tests.support.tiny_drafts import edit_config

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240
SERVER_TIMEOUT_S = 900
# The recipes are for a file of problems, which is not here.
TOY = "data=arithmetic"
# Any machine, and one small step: what a test changes of a recipe for eight GPUs.
EMBEDDED = (
    *(TOY, "--debug-rollout-only", "--rollout-engine", "embedded", "--rollout-num-gpus-per-engine", "0"),
    "cluster.ray_address=null",
    *("--rollout-num-engines", "1", "--rollout-num-cpus-per-engine", "1", "--sglang-dtype", "float32"),
    *("--num-rollout", "2", "--rollout-batch-size", "2", "--n-samples-per-prompt", "2"),
    *("--rollout-max-prompt-len", "128", "--rollout-max-response-len", "12", "--no-console"),
)
# The same on a real SGLang server, as small as its pure-torch stand-in kernels want it.
ON_SGLANGS_CPU = (
    *(TOY, "--debug-rollout-only", "--rollout-num-gpus-per-engine", "0", "--rollout-num-engines", "1"),
    "cluster.ray_address=null",
    *("--rollout-num-cpus-per-engine", "1", "--sglang-dtype", "float32", "--sglang-attention-backend", "intel_amx"),
    *("--sglang-mem-fraction-static", "0.3", "--sglang-max-total-tokens", "4096", "--sglang-sleep-on-idle"),
    *("--actor-start-timeout-s", "600"),
    *("--num-rollout", "2", "--rollout-batch-size", "1", "--n-samples-per-prompt", "2", "--no-console"),
    *("--rollout-max-prompt-len", "128", "--rollout-max-response-len", "12", "--rollout-temperature", "0"),
)
# The CPU is one device: a recipe whose GPUs attend for sequences of their own cannot do so there.
ON_THE_CPU_TOO = {"run-deepseek-r1-mtp.sh": ("--no-sglang-enable-dp-attention", "--sglang-dp-size", "1")}
# The plan for another machine: this one need not have eight GPUs, nor sglang.
# Stand-ins cannot be split over ranks: they know 257 tokens.
UNSPLIT = (
    *("--tensor-model-parallel-size", "1"),
    *("--expert-model-parallel-size", "1", "--expert-tensor-parallel-size", "1"),
)
ELSEWHERE = (TOY, "--skip-check", "gpus", "sglang-version", *UNSPLIT)
# What a test changes of a recipe to train without a GPU: a Ray and a rank of its own, and the embedded engine.
TRAINING = (
    *(TOY, "--rollout-engine", "embedded", "--rollout-num-gpus-per-engine", "0", "--rollout-num-engines", "1"),
    *("--rollout-num-cpus-per-engine", "1", "--sglang-dtype", "float32", "cluster.ray_address=null"),
    *("--actor-num-gpus", "0", "--actor-world-size", "1", "trainer.num_cpus_per_rank=1", *UNSPLIT),
    *("--train-dtype", "float32", "--num-rollout", "1", "--rollout-batch-size", "2", "--n-samples-per-prompt", "2"),
    *("--rollout-max-prompt-len", "128", "--rollout-max-response-len", "12", "--no-console"),
)


GUIDE = {
    "speculative-algorithm": "EAGLE3",
    "speculative-num-steps": "5",
    "speculative-eagle-topk": "8",
    "speculative-num-draft-tokens": "32",
    "max-running-requests": "48",
    "dtype": "float16",
    "context-length": "2048",
    "attention-backend": "fa3",
    "mem-fraction-static": "0.8",
}


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StandIn]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in STAND_INS.items()}


def planned(script: str, made: StandIn, *arguments: str, **environ: str) -> str:
    """What the script prints where it starts nothing."""
    done = run_in_process(script, *arguments, environ={**made.environ, **environ})
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def run_script(script: str, made: StandIn, *arguments: str, timeout_s: float = TIMEOUT_S, **environ: str) -> str:
    """The script's standard output; its errors are shown where it fails."""
    done = ended_script(script, made, *arguments, timeout_s=timeout_s, **environ)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def ended_script(
    script: str, made: StandIn, *arguments: str, timeout_s: float = TIMEOUT_S, **environ: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **made.environ, "SLIME_SPEC_VENV": sys.prefix, **environ},
    )


def test_every_recipe_has_a_stand_in() -> None:
    scripts = {path.name for path in (ROOT / "scripts").glob("run-*.sh")}
    assert scripts - {"run-smollm2-135M.sh"} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_recipe_prints_its_whole_plan_and_preflight_lets_it_go_on(script: str, stand_ins: dict[str, StandIn]) -> None:
    told = planned(script, stand_ins[SCRIPTS[script]], "--dry-run", *ELSEWHERE)
    assert "-m sglang.launch_server" in told
    assert "warning" not in told
    assert told.rstrip().endswith("a launch would go on")


def test_the_llama_recipe_has_the_guides_settings(stand_ins: dict[str, StandIn]) -> None:
    made = stand_ins["llama3.1-8b"]
    config = yaml.safe_load(planned("run-eagle3-llama3.1-8B.sh", made, SLIME_SPEC_COMMAND="config"))
    speculative, engine, rollout = config["speculative"], config["engine"], config["rollout"]
    shape = [speculative[name] for name in ("algorithm", "num_steps", "eagle_topk", "num_draft_tokens")]
    assert shape == ["EAGLE3", 5, 8, 32]
    assert [engine[name] for name in ("max_running_requests", "dtype", "context_length")] == [48, "float16", 2048]
    assert config["sglang"] == {"attention_backend": "fa3", "mem_fraction_static": 0.8}
    assert rollout["num_gpus_per_engine"] == 1
    assert speculative["draft_model_path"] == str(made.draft)
    # With the tokens of one round, within the positions that the draft knows.
    assert rollout["max_prompt_len"] + rollout["max_response_len"] + 32 <= 2048


def test_the_servers_of_the_llama_recipe_are_started_with_the_guides_flags(stand_ins: dict[str, StandIn]) -> None:
    made = stand_ins["llama3.1-8b"]
    told = planned("run-eagle3-llama3.1-8B.sh", made, "--dry-run", *ELSEWHERE)
    # The command alone: what the doctor advises below it names flags as well.
    command = told.replace("\\\n", " ").partition("server of engine 0: ")[2].partition("\n")[0]
    flags = dict(re.findall(r"--([a-z-]+) ([^\s-][^\s]*)", command))
    assert {name: flags[name] for name in GUIDE} == GUIDE
    assert flags["speculative-draft-model-path"] == str(made.draft)
    assert flags["tp-size"] == "1"


def test_the_deepseek_recipe_drafts_a_chain_of_three(stand_ins: dict[str, StandIn]) -> None:
    config = yaml.safe_load(planned("run-deepseek-r1-mtp.sh", stand_ins["deepseek-r1"], SLIME_SPEC_COMMAND="config"))
    shape = [config["speculative"][name] for name in ("algorithm", "num_steps", "eagle_topk", "num_draft_tokens")]
    assert shape == ["EAGLE", 3, 1, 4]


def test_the_deepseek_recipe_plans_with_weights_in_fp8_which_it_is_for(tmp_path: Path) -> None:
    made = StandIn(store_in_fp8(STAND_INS["deepseek-r1"](tmp_path).target), None)
    told = planned("run-deepseek-r1-mtp.sh", made, "--dry-run", *ELSEWHERE)
    assert "warning" not in told
    assert told.rstrip().endswith("a launch would go on")
    embedded = planned("run-deepseek-r1-mtp.sh", made, "--dry-run", *EMBEDDED, *ELSEWHERE)
    assert embedded.rstrip().endswith("a launch would go on")


# GLM-4.6 has GLM-4.5's, and the smaller Qwen3 the larger one's.
OWN_STAND_INS = sorted(set(SCRIPTS) - {"run-glm4.6-355B-A32B-mtp.sh", "run-qwen3-30B-A3B-eagle3.sh"})


def test_rollouts_alone_of_a_recipe_that_trains_its_draft_run_without_a_gpu(
    stand_ins: dict[str, StandIn], tmp_path: Path
) -> None:
    run_script("run-glm4.5-air-mtp.sh", stand_ins["glm4.5-air"], *EMBEDDED, "--output-dir", str(tmp_path / "run"))
    assert len(speculating_steps(tmp_path / "run")) == 2


QUICK, *LONG = OWN_STAND_INS
WHOLE_RUN = pytest.mark.proves("slime_spec", "rollout", "trainer_bridge", "conf", "scripts")
SHORTENED = [QUICK, *(pytest.param(name, marks=WHOLE_RUN) for name in LONG)]


@pytest.mark.parametrize("script", SHORTENED)
def test_a_recipe_trains_without_a_gpu(script: str, stand_ins: dict[str, StandIn], tmp_path: Path) -> None:
    """One step, with the recipe's optimizer: its states split and in host memory where the recipe has them so."""
    run_script(script, stand_ins[SCRIPTS[script]], *TRAINING, "--output-dir", str(tmp_path / "run"))
    (step,) = speculating_steps(tmp_path / "run")
    assert step["train/num_optimizer_steps"] == 1
    assert (tmp_path / "run" / "hf" / "config.json").is_file()


def speculating_steps(run: Path) -> list[dict[str, float | None]]:
    """The metrics of a run's steps, each of which drafted; the doctor reads the same acceptance from them."""
    steps = read_metrics(run / "metrics.jsonl")
    for step in steps:
        assert step["rollout/num_samples"] == 4
        assert (step["spec/verify_rounds"] or 0) > 0
        assert (step["spec/drafted_tokens"] or 0) > 0
    told = run_doctor_on(run)
    (bar,) = (each for each in told["findings"] if each["id"] == "acceptance-bar")
    assert f"finished run: {steps_rate(steps):.0%}" in bar["read"]
    return steps


def run_doctor_on(run: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "slime_spec", "doctor", "--json", "--metrics", str(run)], capture_output=True, text=True
    )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def steps_rate(steps: list[dict[str, float | None]]) -> float:
    """Share of the run's rounds that accepted their first draft."""
    rounds = [step["spec/verify_rounds"] or 0.0 for step in steps]
    rates = [step.get("spec/accept_rate_cum_pos_0") or 0.0 for step in steps]
    return sum(rate * number for rate, number in zip(rates, rounds, strict=True)) / sum(rounds)


def test_latent_attention_too_large_for_the_embedded_engine_is_refused_with_the_way_out(
    stand_ins: dict[str, StandIn], tmp_path: Path
) -> None:
    """The embedded engine's cache has a key and a value for every head: 6 MB a token of the real model."""
    model = tmp_path / "model"
    shutil.copytree(stand_ins["deepseek-r1"].target, model)
    edit_config(model, num_attention_heads=128, num_hidden_layers=61, qk_nope_head_dim=128, qk_rope_head_dim=64)
    arguments = [*EMBEDDED, "--output-dir", str(tmp_path / "run")]
    done = run_in_process("run-deepseek-r1-mtp.sh", *arguments, environ={"MODEL_DIR": str(model)})
    assert done.returncode == 2
    told = (
        "DeepseekV3ForCausalLM's latent attention would take 11,993,088 bytes of cache for a token (at most 1,048,576)"
    )
    assert f"engine-architecture: {told}, which the embedded engine does not run" in done.stderr
    assert "engine-architecture: Pass --rollout-engine sglang." in done.stderr
    assert not (tmp_path / "run").exists()


def test_without_a_model_folder_a_script_says_which_variable_names_it(tmp_path: Path) -> None:
    done = run_in_process("run-deepseek-r1-mtp.sh", TOY, environ={"MODEL_DIR": str(tmp_path / "absent")})
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.hf_checkpoint\n")
    assert "MODEL_DIR=DIR" in done.stderr


def test_without_gpus_and_sglang_a_script_names_both_and_starts_nothing(
    stand_ins: dict[str, StandIn], tmp_path: Path
) -> None:
    nothing = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    done = ended_script(
        "run-eagle3-llama3.1-8B.sh", stand_ins["llama3.1-8b"], TOY, "--output-dir", str(tmp_path / "run"), **nothing
    )
    assert done.returncode == 2
    assert "gpus: the run wants 8 GPUs and this machine has 0" in done.stderr
    assert "sglang-version: no sglang in this environment's Python" in done.stderr
    assert "SGLANG_PYTHON" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.sglang_server
@pytest.mark.parametrize("script", SHORTENED)
def test_a_recipe_runs_without_a_gpu_on_a_real_sglang_server(
    script: str, stand_ins: dict[str, StandIn], tmp_path: Path
) -> None:
    from tests.support.sglang_real import CPU, sglang_python

    environ = {"PYTHONPATH": f"{CPU}{os.pathsep}{ROOT}", "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    run_script(
        script,
        stand_ins[SCRIPTS[script]],
        *(*ON_SGLANGS_CPU, *ON_THE_CPU_TOO.get(script, ()), "--output-dir", str(tmp_path / "run")),
        timeout_s=SERVER_TIMEOUT_S,
        SGLANG_PYTHON=sglang_python(),
        **environ,
    )
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [step["rollout/num_samples"] for step in steps] == [2, 2]
    assert all((step["spec/verify_rounds"] or 0) > 0 for step in steps)
    assert all((step["spec/drafted_tokens"] or 0) > 0 for step in steps)
