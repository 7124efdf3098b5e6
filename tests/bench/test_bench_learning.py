"""What a run's metrics say, and what whoever started it can see besides."""

from pathlib import Path

import pytest

from slime_spec.bench.learning import MEASURED, Run, learning_rows, read_run, run_seed
from tests.bench.made_up_run import REWARDS, steps, write_run


def values(run: Run) -> dict[str, tuple[float, bool | None]]:
    return {row.id.removeprefix(f"learning.seed{run.seed}."): (row.value, row.holds) for row in learning_rows(run)}


def test_rows_of_a_run_are_the_sums_done_by_hand() -> None:
    got = values(Run(seed=3, steps=steps(), seconds=600.0, peak_bytes=5_000_000_000))
    assert got["reward_first"] == (pytest.approx(0.15), None)
    assert got["reward_last"] == (pytest.approx(0.65), None)
    assert got["rise"] == (pytest.approx(0.5), True)
    assert got["steps"] == (len(REWARDS), True)
    assert got["logprob_abs_diff"] == (3e-6, True)
    assert got["minutes"] == (10.0, True)
    assert got["peak_memory"] == (5.0, True)
    assert got["tokens_per_s"] == (105.5, None)
    # sum of 10 n * n over sum of 10 n for n = 1..12: 6500 / 780
    assert got["accept_length"] == (pytest.approx(6500 / 780), None)


def test_a_step_that_trained_on_nothing_has_no_logprobs_and_the_share_is_of_all_tokens() -> None:
    told = [
        {**step, "train/trained_token_share": share, "train/num_tokens": count}
        for step, share, count in zip(steps()[:3], (0.5, 0.0, 0.25), (100.0, 300.0, 200.0), strict=True)
    ]
    del told[1]["train/train_rollout_logprob_abs_diff"]
    got = values(Run(0, told, None, None))
    assert got["logprob_abs_diff"] == (3e-6, True)
    assert got["trained_token_share"] == (100 / 600, None)
    told[0]["train/train_rollout_logprob_abs_diff"] = None
    assert values(Run(0, told, None, None))["logprob_abs_diff"][1] is False
    assert "trained_token_share" not in values(Run(0, steps(), None, None))


@pytest.mark.parametrize(
    ("run", "missed"),
    [
        (Run(0, steps()[:6] * 7, 600.0, 1), {"steps", "rise"}),
        (Run(0, steps(logprob_abs_diff=1e-4), 600.0, 1), {"logprob_abs_diff"}),
        (Run(0, [*steps()[:11], steps(None)[11]], 600.0, 1), {"logprob_abs_diff"}),
        (Run(0, steps()[::-1], 600.0, 1), {"rise"}),
        (Run(0, steps(), 1201.0, 8_000_000_000), {"minutes", "peak_memory"}),
    ],
    ids=["too many steps", "logprobs at the bound", "a step without logprobs", "unlearning", "too slow, too large"],
)
def test_a_run_that_breaks_a_promise_says_which(run: Run, missed: set[str]) -> None:
    assert {name for name, (_, holds) in values(run).items() if holds is False} == missed


def test_without_the_benchmark_as_its_parent_a_run_has_no_time_and_no_memory(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", seed=11))
    assert (run.seed, run.seconds, run.peak_bytes) == (11, None, None)
    assert {"minutes", "peak_memory"}.isdisjoint(values(run))


def test_a_seed_is_run_by_the_script_with_its_flags_and_measured(tmp_path: Path) -> None:
    made = write_run(tmp_path / "made", seed=5)
    script = tmp_path / "run.sh"
    script.write_text(
        f'[[ "$1 $2 $3" == "--seed 5 --output-dir" && "$MODEL_DIR" == "{tmp_path}/model" ]] || exit 9\n'
        f'sleep 0.3\ncp -r "{made}" "$4"\n'
    )
    run_seed(5, tmp_path / "run", tmp_path / "model", script)
    run = read_run(tmp_path / "run")
    assert (tmp_path / "run" / MEASURED).is_file()
    assert run.seed == 5
    assert run.seconds is not None
    assert run.peak_bytes is not None
    assert run.seconds > 0.3
    assert run.peak_bytes > 100_000  # bash itself


def test_a_run_that_fails_is_an_error_with_its_command(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text("exit 3\n")
    with pytest.raises(RuntimeError, match=r"seed 5 ended with exit code 3: bash .*--seed 5"):
        run_seed(5, tmp_path / "run", tmp_path, script)
