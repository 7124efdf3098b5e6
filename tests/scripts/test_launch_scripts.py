"""The launch scripts on tiny checkpoints of the formats they name: every plan, and what runs without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slime_spec.metrics.jsonl import read_metrics
from tests.support.make_stand_ins import SCRIPTS, STAND_INS, StandIn

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240
SERVER_TIMEOUT_S = 900
# Any machine, and one small step: what a test changes of a recipe for eight GPUs.
EMBEDDED = (
    *("--debug-rollout-only", "--rollout-engine", "embedded", "--rollout-num-gpus-per-engine", "0"),
    *("--rollout-num-engines", "1", "--rollout-num-cpus-per-engine", "1", "--sglang-dtype", "float32"),
    *("--num-rollout", "2", "--rollout-batch-size", "2", "--n-samples-per-prompt", "2"),
    *("--rollout-max-prompt-len", "128", "--rollout-max-response-len", "12", "--no-console"),
)
# The same on a real SGLang server, as small as its pure-torch stand-in kernels want it.
ON_SGLANGS_CPU = (
    *("--debug-rollout-only", "--rollout-num-gpus-per-engine", "0", "--rollout-num-engines", "1"),
    *("--rollout-num-cpus-per-engine", "1", "--sglang-dtype", "float32", "--sglang-attention-backend", "intel_amx"),
    *("--sglang-mem-fraction-static", "0.3", "--sglang-max-total-tokens", "4096", "--actor-start-timeout-s", "600"),
    *("--num-rollout", "2", "--rollout-batch-size", "1", "--n-samples-per-prompt", "2", "--no-console"),
    *("--rollout-max-prompt-len", "128", "--rollout-max-response-len", "12", "--rollout-temperature", "0"),
)
WITHOUT_SGLANG = ("--skip-check", "sglang-version")


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StandIn]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in STAND_INS.items()}


def run_script(script: str, made: StandIn, *arguments: str, timeout_s: float = TIMEOUT_S, **environ: str) -> str:
    """The script's standard output; its errors are shown where it fails."""
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **made.environ, "SLIME_SPEC_VENV": sys.prefix, **environ},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_recipe_has_a_stand_in() -> None:
    scripts = {path.name for path in (ROOT / "scripts").glob("run-*.sh")}
    assert scripts - {"run-smollm2-135M.sh"} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_recipe_prints_its_whole_plan_and_preflight_lets_it_go_on(script: str, stand_ins: dict[str, StandIn]) -> None:
    told = run_script(script, stand_ins[SCRIPTS[script]], "--dry-run", *WITHOUT_SGLANG)
    assert "-m sglang.launch_server" in told
    assert "warning" not in told
    assert told.rstrip().endswith("a launch would go on")


def test_the_llama_recipe_has_the_guides_settings(stand_ins: dict[str, StandIn]) -> None:
    made = stand_ins["llama3.1-8b"]
    config = yaml.safe_load(run_script("run-eagle3-llama3.1-8B.sh", made, SLIME_SPEC_COMMAND="config"))
    speculative, engine, rollout = config["speculative"], config["engine"], config["rollout"]
    shape = [speculative[name] for name in ("algorithm", "num_steps", "eagle_topk", "num_draft_tokens")]
    assert shape == ["EAGLE3", 5, 8, 32]
    assert [engine[name] for name in ("max_running_requests", "dtype", "context_length")] == [48, "float16", 2048]
    assert config["sglang"] == {"attention_backend": "fa3", "mem_fraction_static": 0.8}
    assert rollout["num_gpus_per_engine"] == 1
    assert speculative["draft_model_path"] == str(made.draft)
    # With the tokens of one round, within the positions that the draft knows.
    assert rollout["max_prompt_len"] + rollout["max_response_len"] + 32 <= 2048


def test_the_deepseek_recipe_drafts_a_chain_of_three(stand_ins: dict[str, StandIn]) -> None:
    config = yaml.safe_load(run_script("run-deepseek-r1-mtp.sh", stand_ins["deepseek-r1"], SLIME_SPEC_COMMAND="config"))
    shape = [config["speculative"][name] for name in ("algorithm", "num_steps", "eagle_topk", "num_draft_tokens")]
    assert shape == ["EAGLE", 3, 1, 4]


@pytest.mark.parametrize("script", ["run-eagle3-llama3.1-8B.sh", "run-mimo-7B-rl-mtp.sh"])
def test_a_dense_recipe_runs_without_a_gpu_on_the_embedded_engine(
    script: str, stand_ins: dict[str, StandIn], tmp_path: Path
) -> None:
    run_script(script, stand_ins[SCRIPTS[script]], *EMBEDDED, "--output-dir", str(tmp_path / "run"))
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(steps) == 2
    for step in steps:
        assert step["rollout/num_samples"] == 4
        assert (step["spec/verify_rounds"] or 0) > 0
        assert (step["spec/drafted_tokens"] or 0) > 0


@pytest.mark.sglang_server
def test_the_llama_recipe_runs_without_a_gpu_on_a_real_sglang_server(
    stand_ins: dict[str, StandIn], tmp_path: Path
) -> None:
    from tests.support.sglang_real import CPU, sglang_python

    environ = {"PYTHONPATH": f"{CPU}{os.pathsep}{ROOT}", "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    run_script(
        "run-eagle3-llama3.1-8B.sh",
        stand_ins["llama3.1-8b"],
        *(*ON_SGLANGS_CPU, "--output-dir", str(tmp_path / "run")),
        timeout_s=SERVER_TIMEOUT_S,
        SGLANG_PYTHON=sglang_python(),
        **environ,
    )
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [step["rollout/num_samples"] for step in steps] == [2, 2]
    assert all((step["spec/verify_rounds"] or 0) > 0 for step in steps)
