"""A draft model's confidence is believed as far as it was right, by position and by how sure the model was."""

from __future__ import annotations

import random

import pytest

from slime_spec.speculation.confidence import ConfidenceCalibration, given_parent


def test_before_anything_was_judged_the_model_is_believed() -> None:
    assert ConfidenceCalibration().chances((0.9, 0.5)) == pytest.approx((0.9, 0.45))


def test_each_position_learns_what_its_confidence_is_worth() -> None:
    """The model says 0.85 at both positions: it is always right at the first, and every other time at the second."""
    calibration, rng = ConfidenceCalibration(), random.Random(0)
    for _ in range(1000):
        calibration.note((0.85, 0.85), 1 + rng.randrange(2))
    first, both = calibration.chances((0.85, 0.85))
    assert first > 0.98
    assert both / first == pytest.approx(0.5, abs=0.12)


def test_tokens_after_the_first_wrong_one_say_nothing() -> None:
    calibration = ConfidenceCalibration()
    for _ in range(50):
        calibration.note((0.05, 0.95), 0)
    assert calibration.chances((0.95, 0.95)) == pytest.approx((0.95, 0.95**2))


def test_a_kind_that_was_never_judged_is_like_its_bucket_elsewhere() -> None:
    overconfident = ConfidenceCalibration()
    for _ in range(200):
        overconfident.note((0.7,), 0)
    assert overconfident.chances((0.01, 0.7))[1] / overconfident.chances((0.01,))[0] < 0.1


def test_a_policy_that_changed_is_followed() -> None:
    calibration = ConfidenceCalibration()
    for right in (0, 1):
        for _ in range(400):
            calibration.note((0.6,), right)
    assert calibration.chances((0.6,))[0] > 0.9


def test_chances_and_those_given_the_parent_say_the_same() -> None:
    assert given_parent((0.5, 0.25, 0.0, 0.0)) == [0.5, 0.5, 0.0, 0.0]
