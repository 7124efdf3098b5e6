"""The push and parity parts over real actors, on tiny models."""

from pathlib import Path

import pytest
import torch

from slime_spec.bench.parity import Trained, parity_rows, random_policy, reference_rows, resume_rows
from slime_spec.bench.push import CopyRoom, push_rounds, push_rows
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes, load_tensors
from slime_spec.launch.compose import compose
from slime_spec.types import TrainReport
from tests.support.tiny_models import load_reference, make_tiny_checkpoint


def test_a_random_policy_is_a_checkpoint_for_both_sides_and_follows_its_seed(tmp_path: Path) -> None:
    one, again, other = (random_policy(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    spec = ModelSpec.from_folder(one)
    tensors, same, different = (load_tensors(folder, spec) for folder in (one, again, other))
    loaded = load_reference(one).state_dict()
    for name in expected_shapes(spec):
        assert (tensors[name] == same[name]).all()
        assert (tensors[name] != different[name]).any()
        assert (tensors[name] == loaded[name]).all()


def trained(losses: tuple[float, ...], weight: float) -> Trained:
    reports = [TrainReport(loss, 0.0, 1.0, 1.0, 0.5, 0.0, 0.1, 10, 10, 1, 1) for loss in losses]
    return Trained(reports, {"a": torch.zeros(3), "b": torch.tensor([0.0, weight])})


@pytest.mark.parametrize(
    ("other", "values", "holds"),
    [
        (trained((1.0, 2.0), 5.0), [0.0, 0.0], [True, True]),
        (trained((1.0, 1.75), 5.0), [0.25, 0.0], [False, True]),
        (trained((1.0, 2.0), 4.5), [0.0, 0.5], [True, False]),
    ],
)
def test_a_trainer_that_differs_in_one_step_or_one_weight_is_found(
    other: Trained, values: list[float], holds: list[bool]
) -> None:
    for rows in (reference_rows, resume_rows):
        compared = rows("1x1", trained((1.0, 2.0), 5.0), other)
        assert [row.value for row in compared] == values
        assert [row.holds for row in compared] == holds


def test_copies_move_every_byte(tmp_path: Path) -> None:
    tensors = load_tensors(random_policy(tmp_path, 0), ModelSpec.from_folder(tmp_path))
    room = CopyRoom(tensors)
    assert room.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert room.fresh_copy_s() > 0
    assert room.warm_copy_s() > 0
    assert room._warm.numpy().tobytes() == b"".join(tensor.numpy().tobytes() for tensor in tensors.values())


@pytest.mark.long
def test_the_push_part_times_real_pushes_and_copies_of_the_same_bytes(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    config = compose(["--config", "tiny", "--hf-checkpoint", str(folder)])
    rounds = push_rounds(config, 2)
    spec = ModelSpec.from_folder(folder)
    nbytes = sum(tensor.nbytes for tensor in load_tensors(folder, spec).values())
    assert [each.push.report.version for each in rounds] == [1, 2, 3]
    for each in rounds:
        assert each.push.report.nbytes == nbytes
        waits = each.push.trainer_wait_s + each.push.begin_s + each.push.buckets_s + each.push.commit_s
        assert 0 < waits <= each.push.report.seconds
    rows = {row.id: row for row in push_rows(rounds, config)}
    later = sorted(each.push.report.seconds for each in rounds[1:])
    assert rows["push.first_s"].value == rounds[0].push.report.seconds
    assert rows["push.seconds"].value == pytest.approx(sum(later) / 2)
    assert rows["push.bytes_per_s"].value == pytest.approx(nbytes / (sum(later) / 2))
    assert rows["push.ratio"].reach == "<= 3"
    assert rows["push.ratio_warm"].holds is None


@pytest.mark.long
def test_the_parity_part_finds_the_trainer_equal_to_the_reference_and_resumable(tmp_path: Path) -> None:
    rows = {row.id: row for row in parity_rows(random_policy(tmp_path / "policy", 0), tmp_path, 0, ["1x1"])}
    differences = {"loss_diff", "weight_diff", "resume_loss_diff", "resume_weight_diff"}
    assert rows.keys() == {"parity.weights_moved"} | {f"parity.1x1.{name}" for name in differences}
    assert rows["parity.weights_moved"].value > 5e-3
    assert all(row.holds for name, row in rows.items() if name != "parity.weights_moved")
