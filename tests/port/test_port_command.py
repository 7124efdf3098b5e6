"""``slime-spec port`` says what each flag of a slime script is here, and its command composes to that."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from slime_spec.launch import cli
from slime_spec.launch.cli import main
from slime_spec.launch.compose import compose

Capture = pytest.CaptureFixture[str]

# A script in slime's shape: a model's arguments, variables with defaults, a note, a flag that is refused.
SCRIPT = """
BASE=${BASE:-/data}
MODEL_ARGS=(--num-layers 36 --swiglu --rotary-base 1000000)
ARGS=(
   --hf-checkpoint ${BASE}/Qwen3-4B
   --ref-load ${BASE}/Qwen3-4B_torch_dist
   --prompt-data ${BASE}/math.jsonl
   --label-key label
   --rollout-batch-size 32
   --n-samples-per-prompt 8
   --rollout-max-response-len 8192
   --global-batch-size 256
   # --micro-batch-size 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 9216
   --optimizer adam
   --sglang-server-concurrency 100
   --rollout-num-gpus-per-engine 2
   --wandb-key "${WANDB_KEY}"
   --tensor-model-parallel-size 2
)
ray job submit --runtime-env-json='{}' -- python3 train.py --actor-num-nodes 2 --actor-num-gpus-per-node 4 \\
   --colocate ${MODEL_ARGS[@]} ${ARGS[@]} EXTRA
"""


def script(folder: Path, extra: str = "") -> str:
    path = folder / "run-qwen3-4B.sh"
    path.write_text(SCRIPT.replace("EXTRA", extra))
    return str(path)


def words_of(printed: str) -> list[str]:
    """Return the flags of a printed command, without the name before them and the script's arguments after them."""
    words = shlex.split(printed.replace("\\\n", ""), comments=True)
    assert (words[:2], words[-1]) == (["slime-spec", "train"], "$@")
    return words[2:-1]


@pytest.fixture(autouse=True)
def _outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BASE", "WANDB_KEY", "BASE_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_a_script_becomes_a_command_that_composes_to_what_slime_would_do(tmp_path: Path, capsys: Capture) -> None:
    assert main(["port", script(tmp_path)]) == 0
    printed = capsys.readouterr()
    words = words_of(printed.out)
    assert words[:2] == ["--config", "slime"]
    config = compose(words)
    assert (config.trainer.num_gpus, config.trainer.world_size, config.cluster.num_gpus_per_node) == (8, 8, 4)
    assert (config.rollout.engine, config.rollout.num_engines, config.rollout.num_gpus_per_engine) == ("sglang", 4, 2)
    assert (config.cluster.colocate, config.trainer.dtype, config.engine.max_running_requests) == (
        True,
        "bfloat16",
        100,
    )
    assert (config.task.input_key, config.task.apply_chat_template) == ("input", False)
    assert (config.model.hf_checkpoint, config.run.name) == ("/data/Qwen3-4B", "run-qwen3-4B")
    assert not {"--optimizer", "--num-layers", "--ref-load", "--wandb-key"} & set(words)


def test_the_table_says_what_became_of_every_flag(tmp_path: Path, capsys: Capture) -> None:
    main(["port", script(tmp_path)])
    table = capsys.readouterr().err
    titles = [line for line in table.splitlines() if not line.startswith(" ")]
    assert titles == ["the same here (11)", "no effect, because (6)", "added (1)", "mapped (4)"]
    assert "--num-layers 36, --swiglu, --rotary-base 1000000" in table
    assert "set WANDB_API_KEY" in table
    assert "--micro-batch-size" not in table


def test_what_is_missing_is_told_with_its_reason_and_by_the_exit_code(tmp_path: Path, capsys: Capture) -> None:
    extra = "--use-opd --context-parallel-size 4 --save $BASE_DIR/out --lr $LR --sglang-config $(mktemp) --made-up 1"
    assert main(["port", script(tmp_path, extra)]) == 1
    printed = capsys.readouterr()
    _, _, missing = printed.err.partition("missing here (5)\n")
    told = " ".join(missing.split())
    for words in (
        "--use-opd no teacher is asked",
        "--context-parallel-size 4 must be 1",
        "--lr ${LR} ${LR} is not known",
        "--sglang-config $(mktemp) slime's file describes groups",
        "--made-up 1 is not known here",
        "variables to set: BASE_DIR",
    ):
        assert words in told
    assert ': "${BASE_DIR:?is not set}"' in printed.out
    assert '--save "${BASE_DIR}"/out' in printed.out
    assert "--use-opd" not in printed.out


def test_what_a_shell_fills_in_stays_in_the_command_and_is_not_run_without_it(tmp_path: Path, capsys: Capture) -> None:
    path = script(tmp_path, "--save /out/$(date +%s)")
    assert main(["port", path]) == 0
    assert '--save /out/"$(date +%s)"' in capsys.readouterr().out
    assert main(["port", path, "--run"]) == 1


def test_what_the_flags_together_are_refused_for_is_missing_too(tmp_path: Path, capsys: Capture) -> None:
    assert main(["port", script(tmp_path, "--global-batch-size 7 --rollout-top-k 0")]) == 1
    told = capsys.readouterr().err
    assert "missing here (2)" in told
    assert "trainer.global_batch_size" in told
    assert "rollout.top_k" in told


def test_a_script_of_another_model_than_its_checkpoint_is_told(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 28, "rope_theta": 1000000.0}')
    assert main(["port", script(tmp_path, f"--hf-checkpoint {tmp_path}")]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "missing here (1) --num-layers must be 28" in told


def test_a_reference_of_its_own_is_the_kls_and_missing_where_there_is_none(tmp_path: Path, capsys: Capture) -> None:
    assert main(["port", script(tmp_path, f"--ref-load {tmp_path}")]) == 1
    assert "trainer.ref_load is the reference of a KL, which this run does not" in " ".join(
        capsys.readouterr().err.split()
    )
    assert main(["port", script(tmp_path, f"--ref-load {tmp_path} --use-kl-loss")]) == 0
    assert f"--ref-load {tmp_path}" in capsys.readouterr().out


def test_variables_are_taken_from_the_environment(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASE", "/elsewhere")
    main(["port", script(tmp_path)])
    assert "--hf-checkpoint /elsewhere/Qwen3-4B" in capsys.readouterr().out


def test_run_trains_with_the_flags_after_the_dashes_last(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(cli, "_train", lambda argv: ran.append(argv) or 0)
    assert main(["port", script(tmp_path), "--run", "--", "--num-rollout", "2", "--lr", "1e-5"]) == 0
    assert ran[0][:2] == ["--config", "slime"]
    assert ran[0][-4:] == ["--num-rollout", "2", "--lr", "1e-5"]
    assert main(["port", script(tmp_path), "--run", "--", "--dry-run"]) == 0
    assert ran.pop()[-1] == "--dry-run"
    assert "slime-spec train" not in capsys.readouterr().out
    assert main(["port", script(tmp_path, "--use-opd"), "--run"]) == 1
    assert main(["port", script(tmp_path, "--save $BASE_DIR/out"), "--run"]) == 1
    assert len(ran) == 1


def test_flags_after_the_dashes_replace_nodes_times_gpus(tmp_path: Path, capsys: Capture) -> None:
    on_cpu = "--rollout-engine embedded --rollout-num-gpus-per-engine 0 --actor-num-gpus 0 --actor-world-size 2"
    path = script(tmp_path, "--rollout-num-gpus 8")
    assert main(["port", path, "--", *on_cpu.split(), "--rollout-num-engines", "2"]) == 0
    config = compose(words_of(capsys.readouterr().out))
    assert (config.trainer.num_gpus, config.trainer.world_size, config.rollout.num_engines) == (0, 2, 2)


def test_on_cpu_takes_the_place_of_everything_that_a_script_says_about_gpus(tmp_path: Path, capsys: Capture) -> None:
    """Other checkpoints have other shapes, and what the script says of its own model's is no contradiction."""
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 30}')
    gpus = (
        "--context-parallel-size 2 --pipeline-model-parallel-size 2 --expert_model_parallel_size 8 --rollout-num-gpus 8"
    )
    path = script(tmp_path, gpus)
    assert main(["port", path]) == 1
    capsys.readouterr()
    assert main(["port", path, "--on-cpu", "--", "--hf-checkpoint", str(tmp_path), "--input-key", "messages"]) == 0
    printed = capsys.readouterr()
    config = compose(words_of(printed.out))
    trainer, rollout = config.trainer, config.rollout
    assert (trainer.num_gpus, trainer.world_size, rollout.num_engines, rollout.num_gpus_per_engine) == (0, 1, 1, 0)
    assert (trainer.tensor_model_parallel_size, trainer.pipeline_model_parallel_size) == (1, 1)
    assert (trainer.expert_model_parallel_size, rollout.engine, config.cluster.colocate) == (1, "embedded", True)
    assert (rollout.batch_size, config.task.input_key) == (32, "messages")
    assert "--input-key" not in printed.err.partition("added (1)")[2]
    assert "--context-parallel-size 2" in printed.err.partition("flags after -- say it:")[2]


def test_a_run_is_named_as_its_script_unless_somebody_names_it_or_its_folder(tmp_path: Path, capsys: Capture) -> None:
    for extra, name in (([], "run-qwen3-4B"), (["--run-name", "mine"], "mine"), (["run.output_dir=here"], "slime")):
        main(["port", script(tmp_path), "--", *extra])
        assert compose(words_of(capsys.readouterr().out)).run.name == name


def test_flags_after_the_dashes_win_over_on_cpu(tmp_path: Path, capsys: Capture) -> None:
    flags = ["--actor-world-size", "2", "--tensor-model-parallel-size", "2"]
    assert main(["port", script(tmp_path), "--on-cpu", "--", *flags]) == 0
    trainer = compose(words_of(capsys.readouterr().out)).trainer
    assert (trainer.world_size, trainer.tensor_model_parallel_size) == (2, 2)


def test_a_printed_script_hands_on_its_arguments(tmp_path: Path, capsys: Capture) -> None:
    """Bash itself runs the printed script, with a function in the place of the command."""
    main(["port", script(tmp_path), "--", "--lr", "1e-5"])
    text = "slime-spec() { printf '%s\\n' \"$@\"; }\n" + capsys.readouterr().out
    ran = subprocess.run(["bash", "-c", text, "run.sh", "--num-rollout", "a b"], capture_output=True, text=True)
    assert ran.stdout.splitlines()[-4:] == ["--lr", "1e-5", "--num-rollout", "a b"]


def test_an_asynchronous_launch_is_told_that_steps_take_turns(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "run.sh"
    path.write_text("python train_async.py --colocate --input-key prompt --prompt-data d.jsonl\n")
    main(["port", str(path)])
    assert "no sample is older than its weights: train_async.py" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("text", [None, "echo nothing\n"])
def test_a_script_that_cannot_be_read_is_an_error(text: str | None, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "run.sh"
    if text is not None:
        path.write_text(text)
    assert main(["port", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
