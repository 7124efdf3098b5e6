"""--config slime has slime's defaults; where one stays this project's, a reason is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slime_spec.config.schema import SGLANG
from slime_spec.errors import ConfigError
from slime_spec.launch.compose import compose
from slime_spec.launch.flags import Flag, find_flag
from slime_spec.launch.slime.defaults import KEPT

HERE = Path(__file__).parent
# Facts: the defaults of slime's parser, and those of Megatron's that scripts leave to it.
DEFAULTS = dict(
    line.split(" ", 1)
    for name in ("defaults_of_megatron.txt", "arguments_of_slime.txt")
    for line in (HERE / name).read_text(encoding="utf-8").splitlines()
)
# What slime's default is here, where the same is said in another way.
SAME = {
    "--rollout-function-path": None,  # slime's own function is what this project does
    "--rollout-sample-hook-path": (),
    "--rollout-num-gpus": None,
}
# The least that a run of slime's needs; it compares samples, as its default of one would learn nothing.
NEEDED = ["--prompt-data", "prompts.jsonl", "--n-samples-per-prompt", "2"]


def slimes(name: str, flag: Flag, is_on: bool) -> Any:
    """slime's default as a value of our setting."""
    text = DEFAULTS[name]
    if name in SAME:
        return SAME[name]
    if flag.num_values == "0":
        return flag.on if (text == "True") == is_on else flag.off
    return None if text == "None" else flag.convert([text])


def accepted() -> dict[str, tuple[Flag, bool]]:
    """Slime's arguments that set a setting of this project's."""
    found = {}
    for name in DEFAULTS:
        try:
            flag, is_on = find_flag(name)
        except ConfigError:
            continue
        if not flag.path.startswith("--") and flag.path.partition(".")[0] != SGLANG:
            found[name] = (flag, is_on)
    return found


def test_the_preset_has_slimes_defaults_but_for_those_with_a_reason() -> None:
    config = compose(["--config", "slime", *NEEDED])
    assert len(accepted()) > 100
    different = set()
    for name, (flag, is_on) in accepted().items():
        node, _, leaf = flag.path.partition(".")
        ours = getattr(getattr(config, node), leaf)
        if ours != slimes(name, flag, is_on) and not (DEFAULTS[name] == "None" and ours in ((), None)):
            different.add(name)
    given = {"--prompt-data", "--n-samples-per-prompt"}
    assert different - given - KEPT.keys() == set(), "without a reason"
    assert KEPT.keys() - different == set(), "a reason for what is the same"


def test_one_sample_a_prompt_is_slimes_default_too() -> None:
    argv = ["--config", "slime", "--prompt-data", "prompts.jsonl", "--advantage-estimator", "reinforce_plus_plus"]
    assert compose(argv).rollout.n_samples_per_prompt == int(DEFAULTS["--n-samples-per-prompt"]) == 1


def test_tools_are_read_where_a_row_has_them_and_not_missed_where_none_has() -> None:
    assert compose(["--config", "slime", *NEEDED]).task.tool_key == DEFAULTS["--tool-key"] == "tools"
