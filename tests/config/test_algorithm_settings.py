"""slime's flags of the algorithm, as its run scripts spell them, and what is said of settings without effect."""

import pytest

from slime_spec.config.algorithm import ESTIMATORS
from slime_spec.config.checks import notes
from slime_spec.launch.compose import compose


def test_a_scripts_grpo_arguments_mean_what_they_do_in_slime() -> None:
    words = (
        "--advantage-estimator gspo --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl --kl-coef 0.00 "
        "--entropy-coef 0.00 --eps-clip 4e-4 --eps-clip-high 4e-4 --use-tis --tis-clip 2.0 --tis-clip-low 0.5 "
        "--calculate-per-token-loss --num-steps-per-rollout 4 --lr 1e-6 --lr-decay-style cosine "
        "--lr-warmup-fraction 0.1 --min-lr 1e-7 --rollout-batch-size 32 --n-samples-per-prompt 8"
    )
    config = compose(words.split())
    algorithm, trainer = config.algorithm, config.trainer
    assert (algorithm.advantage_estimator, algorithm.loss_mean, algorithm.kl_loss_type) == (
        *("gspo", "token", "low_var_kl"),
    )
    assert (algorithm.use_tis, algorithm.tis_clip, algorithm.tis_clip_low) == (True, 2.0, 0.5)
    assert (trainer.lr_decay_style, trainer.lr_warmup_fraction, trainer.min_lr) == ("cosine", 0.1, 1e-7)
    assert config.samples_per_step == 64
    assert algorithm.needs_reference, "its KL is measured, whatever its weight"
    assert not algorithm.moves_at_advantage_0
    assert list(notes(config)) == []


def test_without_per_token_loss_the_mean_is_that_of_the_estimators_paper() -> None:
    means = {name: compose(["--advantage-estimator", name]).algorithm.estimator.loss_mean for name in ESTIMATORS}
    assert {name: mean for name, mean in means.items() if mean != "token"} == {"gspo": "sample", "dr_grpo": "constant"}
    assert compose(["--no-calculate-per-token-loss"]).algorithm.loss_mean == "sample"
    assert compose([]).algorithm.loss_mean is None


@pytest.mark.parametrize(
    ("words", "is_needed", "moves"),
    [
        ("", False, False),
        ("--use-kl-loss", True, False),
        ("--kl-loss-coef 0.1", True, True),
        ("--kl-coef 0.1", True, False),
        ("--entropy-coef 0.01", False, True),
    ],
)
def test_a_reference_is_kept_and_flat_samples_are_trained_where_something_needs_it(
    words: str, is_needed: bool, moves: bool
) -> None:
    algorithm = compose(words.split()).algorithm
    assert (algorithm.needs_reference, algorithm.moves_at_advantage_0) == (is_needed, moves)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--gamma 0.9", "--gamma has no effect"),
        ("--tis-clip 3.0", "Without --use-tis"),
        ("--kl-loss-type k2", "--kl-loss-type has no effect"),
        ("--kl-loss-type k1 --kl-loss-coef 0.1", "noise around 0"),
        ("--advantage-estimator gspo", "--eps-clip 3e-4"),
        ("--advantage-estimator cispo", "--eps-clip 1.0"),
        ("--min-lr 1e-7", "does not decay"),
        (
            "--advantage-estimator reinforce_plus_plus --disable-grpo-std-normalization",
            "--disable-grpo-std-normalization has no effect",
        ),
    ],
)
def test_a_setting_without_effect_or_far_from_its_paper_is_noted(words: str, said: str) -> None:
    (note,) = notes(compose(words.split()))
    assert said in note


@pytest.mark.parametrize(
    "words",
    [
        "--advantage-estimator reinforce_plus_plus --gamma 0.9",
        "--use-tis --tis-clip 3.0",
        "--kl-loss-type k2 --kl-coef 0.1",
        "--advantage-estimator cispo --eps-clip 1.0 --eps-clip-high 4.0",
        "--min-lr 1e-7 --lr-decay-style linear",
    ],
)
def test_nothing_is_noted_where_it_has_one(words: str) -> None:
    assert list(notes(compose(words.split()))) == []
