"""Folders of data: those of Hugging Face datasets, and folders of parquet files as the hub has them."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest
from data_files import config

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import TaskConfig
from slime_spec.errors import ConfigError
from slime_spec.rl.rollout_data import load_rollout, save_rollout
from slime_spec.tasks.source import PromptSource
from slime_spec.types import GeneratedSample, Sample

datasets = pytest.importorskip("datasets")


def rows(name: str, count: int) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"{name}{i}"}], "label": str(i), "metadata": {"level": i or None}}
            for i in range(count)
        ]
    )


def taken(named: object, tokenizer: Tokenizer) -> list[str]:
    task = TaskConfig(prompt_data=str(named), shuffle=False)
    source = PromptSource(config(task), tokenizer)
    assert source.num_rows is not None
    return [prompt.text for prompt in source.take(source.num_rows, 0)]


def test_a_folder_of_save_to_disk_is_read_whole_or_in_part(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows("a", 5).save_to_disk(str(tmp_path / "one"))
    assert taken(tmp_path / "one", tokenizer) == ["a0", "a1", "a2", "a3", "a4"]
    assert taken(f"{tmp_path / 'one'}@[1:3]", tokenizer) == ["a1", "a2"]
    assert taken(f"{tmp_path / 'one'}@[-2:]", tokenizer) == ["a3", "a4"]
    source = PromptSource(config(TaskConfig(prompt_data=str(tmp_path / "one"), shuffle=False)), tokenizer)
    assert [prompt.metadata for prompt in source.take(2, 0)] == [{}, {"level": 1}]
    with pytest.raises(ConfigError, match="is one dataset, without splits"):
        taken(f"{tmp_path / 'one'}@test", tokenizer)


def test_a_split_is_named_and_train_is_the_default(tokenizer: Tokenizer, tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": rows("a", 3), "test": rows("b", 2)})
    both.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    both["train"].select([0]).to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00002.parquet")
    both["train"].select([1, 2]).to_parquet(tmp_path / "hub" / "data" / "train-00001-of-00002.parquet")
    both["test"].to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    for folder in (tmp_path / "saved", tmp_path / "hub"):
        assert taken(folder, tokenizer) == ["a0", "a1", "a2"]
        assert taken(f"{folder}@test", tokenizer) == ["b0", "b1"]
        assert taken(f"{folder}@train[1:]", tokenizer) == ["a1", "a2"]
        with pytest.raises(ConfigError, match=r"the split must be one of test, train.*Write .*@SPLIT"):
            taken(f"{folder}@tset", tokenizer)
    assert taken(tmp_path / "saved" / "test", tokenizer) == ["b0", "b1"]


def test_a_folder_that_leaves_its_meaning_open_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="a folder must hold parquet files, or datasets"):
        taken(tmp_path / "empty", tokenizer)
    for name in ("main", "socratic"):
        (tmp_path / "hub" / name).mkdir(parents=True)
        rows(name, 1).to_parquet(tmp_path / "hub" / name / "train-00000-of-00001.parquet")
    with pytest.raises(ConfigError, match=r"must be in one folder, they are in .*main, .*socratic.*Name one"):
        taken(tmp_path / "hub", tokenizer)
    assert taken(tmp_path / "hub" / "main", tokenizer) == ["main0"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "label": 1}\n')
    with pytest.raises(ConfigError, match="a file has no splits"):
        taken(f"{tmp_path / 'rows.jsonl'}@train", tokenizer)


def test_a_damaged_folder_is_one_error_with_its_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows("a", 2).save_to_disk(str(tmp_path / "one"))
    for arrow in (tmp_path / "one").glob("*.arrow"):
        arrow.write_bytes(b"no arrow")
    with pytest.raises(ConfigError, match=r"task\.prompt_data: must be a dataset: .*one"):
        taken(tmp_path / "one", tokenizer)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match=r"must be a parquet file: .*train-00000"):
        taken(tmp_path / "hub", tokenizer)


def test_a_label_that_is_no_text_is_refused_with_its_row_unless_the_reward_is_ones_own(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    datasets.Dataset.from_list([{"prompt": "a", "label": ["1", "2"]}]).save_to_disk(str(tmp_path / "one"))
    task = TaskConfig(prompt_data=str(tmp_path / "one"), reward="exact")
    with pytest.raises(ConfigError, match=r"one:1: 'label' must be a text or a number"):
        PromptSource(config(task), tokenizer)
    (prompt,) = PromptSource(config(replace(task, reward="random")), tokenizer).take(1, 0)
    assert (prompt.label, prompt.answer) == (["1", "2"], '["1", "2"]')


def test_dates_and_decimals_are_texts_so_that_saved_samples_can_be_read_again(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    import pyarrow
    from pyarrow import parquet

    seen = {"day": date(2025, 1, 31), "price": Decimal("1.50"), "level": 3}
    table = pyarrow.Table.from_pylist([{"prompt": "a", "label": Decimal("12.50"), "metadata": seen}])
    parquet.write_table(table, tmp_path / "rows.parquet")
    task = TaskConfig(prompt_data=str(tmp_path / "rows.parquet"), reward="exact")
    (prompt,) = PromptSource(config(task), tokenizer).take(1, 0)
    assert (prompt.answer, prompt.metadata) == ("12.50", {"day": "2025-01-31", "price": "1.50", "level": 3})
    sample = Sample(prompt, GeneratedSample("0", 0, (1,), (-0.5,), "stop", 0, 1), "a", 1.0)
    template = str(tmp_path / "{rollout_id}.pt")
    save_rollout(template, 0, [sample])
    assert load_rollout(template, 0) == [sample]
