"""Saved rollouts come back exactly; damaged ones are refused, and nothing in them is executed."""

from __future__ import annotations

import enum
import json
import math
import pickle
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import disk_of, sample

from slime_spec.config.tree import RunConfig
from slime_spec.errors import ConfigError
from slime_spec.rl.rollout_data import check_rollout_data, load_rollout, save_rollout
from slime_spec.rl.samples_file import append_samples
from slime_spec.routed_experts import RoutedExperts
from slime_spec.types import Sample

finite = st.floats(allow_nan=False, allow_infinity=False)


@given(
    reward=st.none() | finite,
    text=st.text(),
    logprobs=st.lists(finite, max_size=4).map(tuple),
    histogram=st.lists(st.integers(0, 9), max_size=4).map(tuple),
)
def test_samples_come_back_exactly_as_they_were(
    tmp_path_factory: pytest.TempPathFactory,
    reward: float | None,
    text: str,
    logprobs: tuple[float, ...],
    histogram: tuple[int, ...],
) -> None:
    one = sample(reward=reward, histogram=histogram)
    samples = [replace(one, text=text, response=replace(one.response, logprobs=logprobs)), sample(index=1)]
    template = str(tmp_path_factory.mktemp("rollout") / "step_{rollout_id}.pt")
    save_rollout(template, 7, samples)
    assert load_rollout(template, 7) == samples


class Level(enum.IntEnum):
    HARD = 3


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (
            {"a": [1, 2.5, None, True, b"x", (3, "y")], "b": {1, 2}},
            {"a": [1, 2.5, None, True, b"x", (3, "y")], "b": {1, 2}},
        ),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ({"score": np.float32(0.5), "id": np.int64(7), "name": np.str_("n")}, {"score": 0.5, "id": 7, "name": "n"}),
        (Level.HARD, 3),
        (MappingProxyType({"k": (np.int8(1),)}), {"k": (1,)}),
        (date(2026, 1, 2), "datetime.date(2026, 1, 2)"),
        (Decimal("1.50"), "Decimal('1.50')"),
        (range(3), "range(0, 3)"),
    ],
)
def test_what_a_task_gives_besides_texts_is_read_again_as_plain_values(
    tmp_path: Path, value: object, read: object
) -> None:
    """torch.load makes no other objects with weights_only: the whole file could not be read for one of them."""
    one = sample()
    template = str(tmp_path / "step_{rollout_id}.pt")
    odd = replace(one.prompt, label=value, metadata={"given": value})
    save_rollout(template, 0, [replace(one, prompt=odd)])
    (loaded,) = load_rollout(template, 0)
    assert (loaded.prompt.label, loaded.prompt.metadata) == (read, {"given": read})
    assert type(loaded.prompt.label) is type(read)
    assert loaded.response == one.response


@pytest.mark.parametrize("matched_stop", [None, 151645, "</answer>"])
def test_what_ended_a_response_and_what_was_drafted_come_back(tmp_path: Path, matched_stop: int | str | None) -> None:
    one = sample(histogram=(2, 1), num_empty_rounds=2)
    routed = RoutedExperts.of(np.arange(8 * 2 * 3, dtype=np.uint8).reshape(8, 2, 3))
    response = replace(one.response, matched_stop=matched_stop, cached_tokens=5, routed_experts=routed)
    template = str(tmp_path / "step_{rollout_id}.pt")
    save_rollout(template, 0, [replace(one, response=response)])
    loaded = load_rollout(template, 0)[0].response
    assert loaded == response
    assert loaded.routed_experts is not None
    assert loaded.routed_experts.ids[7, 1, 2] == 47
    assert (loaded.matched_stop, loaded.cached_tokens) == (matched_stop, 5)
    assert (loaded.spec.num_drafted, loaded.spec.num_empty_rounds) == (3, 2)


def test_each_step_has_a_file_of_its_own_in_slimes_layout(tmp_path: Path) -> None:
    template = str(tmp_path / "deep" / "step_{rollout_id}.pt")
    paths = [save_rollout(template, step, [sample(prompt_id=step)]) for step in range(2)]
    assert [path.name for path in paths] == ["step_0.pt", "step_1.pt"]
    assert [load_rollout(template, step)[0].prompt.prompt_id for step in range(2)] == [0, 1]
    saved = torch.load(paths[1], weights_only=True)
    assert (saved["rollout_id"], saved["samples"][0]["text"]) == (1, "5")
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["step_0.pt", "step_1.pt"]


class _Malice:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("executed"),))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "damage", ["truncated", "text", "empty", "other_keys", "other_fields", "code", "bare_pickle", "list"]
)
def test_a_file_that_is_no_whole_saved_rollout_is_refused_by_name(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save_rollout("step_{rollout_id}.pt", 0, [sample()])
    match damage:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-200])
        case "text":
            path.write_text("samples")
        case "empty":
            path.write_bytes(b"")
        case "other_keys":
            torch.save({"rows": []}, path)
        case "other_fields":
            torch.save({"samples": [{"prompt": {"id": 1}, "response": {"spec": {}}}]}, path)
        case "code":
            torch.save({"samples": [_Malice()]}, path)
        case "bare_pickle":
            path.write_bytes(pickle.dumps({"samples": [_Malice()]}))
        case "list":
            torch.save([1, 2], path)
    with pytest.raises(ConfigError, match=r"must be a saved rollout .*step_0\.pt"):
        load_rollout("step_{rollout_id}.pt", 0)
    assert not (tmp_path / "executed").exists()


def test_paths_that_cannot_work_are_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent_0\.pt"):
        check_rollout_data(RunConfig(load_debug_rollout_data=str(tmp_path / "absent_{rollout_id}.pt")))
    template = str(tmp_path / "step_{rollout_id}.pt")
    save_rollout(template, 0, [sample()])
    check_rollout_data(RunConfig(num_rollout=1, load_debug_rollout_data=template))
    with pytest.raises(ConfigError, match=r"step_1\.pt.*lower --num-rollout"):  # case reports/13
        check_rollout_data(RunConfig(num_rollout=2, load_debug_rollout_data=template))
    (tmp_path / "step_1.pt").write_text("no rollout")
    with pytest.raises(ConfigError, match=r"saved rollout.*step_1\.pt"):
        check_rollout_data(RunConfig(num_rollout=2, load_debug_rollout_data=template))
    (tmp_path / "step_1.pt").unlink()
    for step in (2, 3):
        save_rollout(template, step, [sample()])
    check_rollout_data(RunConfig(num_rollout=4, load_debug_rollout_data=template), first_rollout_id=2)


def test_the_samples_file_has_a_line_for_each_sample_and_grows_step_by_step(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    for step in range(2):
        append_samples(path, step, [sample(prompt_id=step, histogram=(0, 1)), sample(prompt_id=step, reward=None)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["rollout_id"], row["prompt_id"], row["reward"]) for row in rows] == [
        (0, 0, 1.0),
        (0, 0, None),
        (1, 1, 1.0),
        (1, 1, None),
    ]
    assert (rows[0]["prompt"], rows[0]["reply"], rows[0]["answer"]) == ("What is 2 + 3?", "5", "5")
    assert rows[0]["meta_info"]["spec_verify_ct"] == 1
    assert "KeyError" in rows[1]["error"]


def test_no_text_and_no_disk_ends_a_run_that_writes_its_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Case reports/07: a lone surrogate in an answer or in what a reward raised, and an answer that is no text."""
    path, broken = tmp_path / "samples.jsonl", sample(reward=None)
    answers = ("\ud83d", {"not", "JSON"})
    for answer in answers:
        odd = replace(broken, error="raised ValueError: \udc00", prompt=replace(broken.prompt, answer=answer))
        append_samples(path, 0, [odd])
    rows = [json.loads(line) for line in path.read_bytes().decode().splitlines()]
    assert [row["error"] for row in rows] == ["raised ValueError: \udc00"] * 2
    assert rows[0]["answer"] == "\ud83d"
    append_samples(tmp_path, 1, [broken])
    assert "samples not written" in caplog.text


def test_a_reward_that_is_missing_stays_missing(tmp_path: Path) -> None:
    template = str(tmp_path / "{rollout_id}.pt")
    excluded: Sample = sample(reward=None)
    save_rollout(template, 0, [excluded])
    (loaded,) = load_rollout(template, 0)
    assert (loaded.reward, loaded.error) == (None, excluded.error)
    assert all(math.isfinite(logprob) for logprob in loaded.response.logprobs)


def test_a_full_disk_and_a_folder_that_is_a_file_are_one_clear_error_and_leave_nothing(tmp_path: Path) -> None:
    with disk_of(100), pytest.raises(ConfigError, match=r"save_debug_rollout_data: must be writable: .*0\.pt"):
        save_rollout(str(tmp_path / "{rollout_id}.pt"), 0, [sample()])
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"must be writable: .*File exists"):
        save_rollout(str(tmp_path / "file" / "{rollout_id}.pt"), 0, [sample()])
