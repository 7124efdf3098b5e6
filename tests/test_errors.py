"""Several errors are one error that tells all of them, also behind a process boundary."""

import pickle

import pytest

from slime_spec.errors import CheckpointError, ConfigError, ConfigErrors, each_of, raise_all

FIRST = ConfigError("trainer.lr", "must be at most 1", 7, "Pass --lr 1e-6.")
SECOND = CheckpointError("model.hf_checkpoint", "must be a folder", "x", "Pass a folder.")


def test_no_error_raises_nothing_and_one_is_raised_as_it_is() -> None:
    raise_all([])
    with pytest.raises(CheckpointError) as caught:
        raise_all([SECOND, SECOND])
    assert caught.value is SECOND


def test_several_are_told_in_a_line_each_and_each_text_once() -> None:
    with pytest.raises(ConfigErrors) as caught:
        raise_all([FIRST, ConfigErrors([SECOND, FIRST])])
    assert str(caught.value) == (
        "2 mistakes\n"
        "  trainer.lr: must be at most 1 (got 7). Pass --lr 1e-6.\n"
        "  model.hf_checkpoint: must be a folder (got 'x'). Pass a folder."
    )
    assert each_of(caught.value) == (FIRST, SECOND)
    assert (caught.value.setting, caught.value.value) == ("trainer.lr", 7)


def test_they_cross_a_process_boundary_whole() -> None:
    error = pickle.loads(pickle.dumps(ConfigErrors([FIRST, SECOND])))
    assert isinstance(error, ConfigErrors)
    assert str(error) == str(ConfigErrors([FIRST, SECOND]))
    assert [type(each) for each in error.errors] == [ConfigError, CheckpointError]
