"""Prompts of a data file: its rows, and those that are refused before anything heavy starts."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from data_files import config, jsonl, row

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import TaskConfig
from slime_spec.errors import ConfigError
from slime_spec.tasks.source import PromptSource
from slime_spec.types import GeneratedSample
from tests.support.chat_templates import LLAMA3_1, QWEN2_5, save_tokenizer


def test_a_line_may_hold_a_chat_and_tools(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path, QWEN2_5))
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "2 + 3?"}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [{"prompt": chat, "label": 5, "tools": tools}, {"prompt": "2 + 3?", "label": 5}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskConfig(prompt_data=str(path), tool_key="tools", system_prompt="Mine.")
    prompts = PromptSource(config(task, max_prompt_len=512), tokenizer).take(2, 0)
    assert {prompt.token_ids for prompt in prompts} == {
        tokenizer.chat(chat, tools=tools),
        tokenizer.chat("2 + 3?", "Mine."),
    }
    assert {prompt.text for prompt in prompts} == {"2 + 3?"}
    with pytest.raises(ConfigError, match=r"no line of .* has tools under it"):
        PromptSource(config(replace(task, tool_key="functions"), max_prompt_len=512), tokenizer)
    with pytest.raises(ConfigError, match="messages and tools need the chat template"):
        PromptSource(config(replace(task, system_prompt="", apply_chat_template=False), max_prompt_len=512), tokenizer)


def test_a_line_whose_chat_the_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path, LLAMA3_1))
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "judge", "content": "no"}], "label": 5}))
    with pytest.raises(ConfigError, match=r"data\.jsonl:1: its chat template must render these messages: Unknown role"):
        PromptSource(config(TaskConfig(prompt_data=str(path))), tokenizer)


def test_every_line_of_a_jsonl_file_comes_once_an_epoch_in_another_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = jsonl(tmp_path / "data.jsonl", *(row(f"p{i}", i) for i in range(30)), "")
    source = PromptSource(config(task), tokenizer)
    texts = [prompt.text for prompt in source.take(60, 0)]
    assert set(Counter(texts).values()) == {2}
    assert sorted(texts[:30]) == sorted(texts[30:])
    assert texts[:30] != texts[30:]
    assert [prompt.text for prompt in PromptSource(config(task), tokenizer).take(5, 40)] == texts[40:45]


def test_the_keys_and_the_reward_of_a_jsonl_file_are_settings(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "Capital of France?", "gold": "Paris", "more": 1}\n')
    task = TaskConfig(prompt_data=str(path), input_key="question", label_key="gold", reward="exact")
    source = PromptSource(config(task), tokenizer)
    (prompt,) = source.take(1, 0)
    ids = tokenizer.encode("Paris")
    (sample,) = source.score(prompt, [GeneratedSample("0", 0, ids, (0.0,) * 5, "stop", 0, 1)])()
    assert sample.reward == 1.0
    with pytest.raises(ConfigError, match=r"data\.jsonl:1: 'gold' must be an integer for the reward last_integer"):
        PromptSource(config(replace(task, reward="last_integer")), tokenizer)


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        ('{"prompt": "a", "label": 1', "must be valid JSON"),
        ('["a", 1]', "must be a JSON object"),
        ('{"prompt": "a"}', "must have the key 'label'"),
        ('{"text": "a", "label": 1}', "must have the key 'prompt'"),
        (row(["a"], 1), "'prompt' must be a text"),
        (row("", 1), "'prompt' must be a text that is not empty"),
        (row([], 1), "'prompt' must be a text that is not empty, or a list of messages"),
        (row("a", None), "'label' must be a text or a number"),
        (row("a", "1.5"), "'label' must be an integer"),
        (row("a", 1.5), "'label' must be an integer"),
        (row("a", True), "'label' must be a text or a number"),
        (row("a", ["5", "five"]), "'label' must be a text or a number"),
        ('{"prompt": "a", "label": NaN}', "'label' must be a text or a number"),
        ('{"prompt": "a", "label": 1e400}', "'label' must be a text or a number"),
        ('{"prompt": "a", "label": -Infinity}', "'label' must be a text or a number"),
        ('{"prompt": "a", "label": %s}' % ("9" * 5000), "must be valid JSON: Exceeds the limit"),
        (row("a", "9" * 5000), "'label' must be an integer"),
        (row("a", "²"), "'label' must be an integer"),
        (row("a", "1_0"), "'label' must be an integer"),
        ('{"prompt": "a \\ud83d b", "label": 1}', "must be text that can be encoded"),
        ('{"prompt": "a", "label": "\\ud83d"}', "must be text that can be encoded"),
        ('{"prompt": "a", "label": 1, "old": "\\udc00"}', "must be text that can be encoded"),
        ('{"prompt": [{"role": "user", "content": "\\ud83d"}], "label": 1}', "must be text that can be encoded"),
        ('{"prompt": "a", "label": 1, "tools": [{"\\ud83d": 1}]}', "must be text that can be encoded"),
        ('{"prompt": "a", "label": 1, "tools": "[{\\"\\\\ud83d\\": 1}]"}', "tools: must be text that can be encoded"),
        ('{"prompt": "a", "label": 1, "tools": "["}', "tools: must be valid JSON"),
        ('{"prompt": "a", "label": 1, "tools": [1]}', "'tools' must be a list of JSON schemas"),
        ('{"prompt": "a\x00b", "label": 1}', "must be valid JSON: Invalid control character"),
        ('{"prompt": [{"content": "no role"}], "label": 1}', "its chat template must render these messages"),
        ('{"prompt": [{"role": "user", "content": {"a": [1]}}], "label": 1}', "its chat template must render"),
        ("[" * 100_000, "must be JSON that is not nested so deeply"),
    ],
)
def test_a_broken_line_is_refused_at_the_start_with_file_and_line_number(
    tokenizer: Tokenizer, tmp_path: Path, broken: str, rule: str
) -> None:
    """Cases reports/05 and reports/07."""
    fine = json.dumps({"prompt": "fine", "label": 1, "old": "x", "tools": [{"name": "add"}]})
    task = jsonl(tmp_path / "data.jsonl", fine, "", broken, fine)
    task = replace(task, advice_key="old", tool_key="tools")
    with pytest.raises(ConfigError) as refused:
        PromptSource(config(task), tokenizer)
    assert f"{tmp_path / 'data.jsonl'}:3: {rule}" in str(refused.value)
    assert len(str(refused.value)) < 900


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'\xef\xbb\xbf{"prompt": "a", "label": 5}\r\n\r\n \t\n{"prompt": "b", "label": "6"}', {"a": "5", "b": "6"}),
        (b'{"prompt": "a", "label": 5.0}\n{"prompt": "b", "label": 1e2}', {"a": "5", "b": "100"}),
        (b'{"prompt": "a\\u0000b", "label": " +7 "}', {"a\0b": "+7"}),
        (b'{"prompt": "\\ud83d\\ude00", "label": -0}', {"😀": "0"}),
        (b'{"prompt": "a", "label": 1, "label": 2}', {"a": "2"}),
        (b'{"prompt": "a", "label": 5, "more": [[[{"x": 1e400}]]]}', {"a": "5"}),
        (b'{"prompt": "a", "label": ' + b"9" * 4000 + b"}", {"a": "9" * 4000}),
    ],
)
def test_odd_lines_are_read_as_json_says(
    tokenizer: Tokenizer, tmp_path: Path, content: bytes, expected: dict[str, str]
) -> None:
    """Cases reports/05 and reports/07."""
    (tmp_path / "data.jsonl").write_bytes(content)
    source = PromptSource(config(TaskConfig(prompt_data=str(tmp_path / "data.jsonl"))), tokenizer)
    assert {prompt.text: prompt.answer for prompt in source.take(len(expected), 0)} == expected


@pytest.mark.parametrize(
    ("rows", "kept"),
    [("[0:1]", "a"), ("[:2]", "ab"), ("[-2:]", "de"), ("[1:-1]", "bcd"), ("[3:99]", "de"), ("[:]", "abcde")],
)
def test_a_slice_of_a_file_has_pythons_rows(tokenizer: Tokenizer, tmp_path: Path, rows: str, kept: str) -> None:
    """As slime writes it (case reports/05)."""
    task = jsonl(tmp_path / "data.jsonl", *(row(letter, 1) for letter in "abcde"), "")
    source = PromptSource(config(replace(task, prompt_data=f"{task.prompt_data}@{rows}")), tokenizer)
    assert sorted(prompt.text for prompt in source.take(len(kept), 0)) == list(kept)


@pytest.mark.parametrize(
    ("named", "rule"),
    [
        ("data.jsonl@[5:]", "at least one prompt"),
        ("data.jsonl@[a:b]", "No such file"),
        ("x@[0:1]", "No such file"),
    ],
)
def test_a_slice_without_rows_or_of_no_file_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, named: str, rule: str
) -> None:
    task = jsonl(tmp_path / "data.jsonl", *(row(letter, 1) for letter in "abcde"))
    with pytest.raises(ConfigError, match=rule):
        PromptSource(config(replace(task, prompt_data=str(tmp_path / named))), tokenizer)


def test_a_file_whose_name_looks_like_a_slice_is_itself(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = jsonl(tmp_path / "data.jsonl@[0:1]", row("a", 1), row("b", 1))
    assert len(PromptSource(config(task), tokenizer).take(2, 0)) == 2


@pytest.mark.parametrize("label", ["{}", '{"label": null}'])
def test_a_reward_of_ones_own_needs_no_label(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    """Case reports/05: slime gives such a function no label."""
    (tmp_path / "own_reward.py").write_text("def length(prompt, reply): return len(reply) + len(prompt.answer)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    task = jsonl(tmp_path / "data.jsonl", json.dumps({"prompt": "a", **json.loads(label)}))
    source = PromptSource(config(replace(task, reward="own_reward.length")), tokenizer)
    (prompt,) = source.take(1, 0)
    assert prompt.answer == ""
    ids = tokenizer.encode("abc")
    with closing(source):
        (sample,) = source.score(prompt, [GeneratedSample("0", 0, ids, (0.0,) * 3, "stop", 0, 1)])()
    assert sample.reward == 3.0
    with pytest.raises(ConfigError, match=r"no line of .* has a label under it"):
        PromptSource(config(replace(task, reward="own_reward:length", label_key="gold")), tokenizer)


def test_overlong_prompts_are_left_out_with_their_number_or_refused(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Case reports/05: slime leaves such rows out."""
    long = "x" * 300
    task = jsonl(tmp_path / "data.jsonl", row("a", 1), row(long, 1), row("b", 2), row(long, 1))
    source = PromptSource(config(task), tokenizer)
    assert {prompt.text for prompt in source.take(2, 0)} == {prompt.text for prompt in source.take(2, 2)} == {"a", "b"}
    assert "dropped=2 kept=2 max_prompt_len=200" in caplog.text
    with pytest.raises(ConfigError, match=r"data\.jsonl:2: the prompt must have at most 200 tokens"):
        PromptSource(config(replace(task, refuse_overlong_prompts=True)), tokenizer)
    with pytest.raises(ConfigError, match="all 2 are longer"):
        PromptSource(config(jsonl(tmp_path / "data.jsonl", row(long, 1), row(long, 2))), tokenizer)


def test_the_tools_of_a_row_may_be_the_text_of_a_list(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path, QWEN2_5))
    tools = [{"type": "function", "function": {"name": "add"}}]
    task = jsonl(tmp_path / "data.jsonl", json.dumps({"prompt": "2 + 3?", "label": 5, "tools": json.dumps(tools)}))
    (prompt,) = PromptSource(config(replace(task, tool_key="tools"), max_prompt_len=512), tokenizer).take(1, 0)
    assert prompt.token_ids == tokenizer.chat("2 + 3?", tools=tools)


@pytest.mark.skipif(find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_a_parquet_file_without_pyarrow_is_one_error_that_says_so(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1" + bytes(range(256)) + b"PAR1")
    with pytest.raises(ConfigError, match="a parquet file needs pyarrow"):
        PromptSource(config(TaskConfig(prompt_data=str(tmp_path / "rows.parquet"))), tokenizer)


@pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_a_parquet_file_has_the_prompts_of_the_same_jsonl_file(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path, QWEN2_5))
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "2 + 3?", "name": "me"}]
    rows = [{"prompt": chat, "label": "5"}, {"prompt": chat[1:], "label": "6"}, {"prompt": chat, "label": None}]
    pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    task = jsonl(tmp_path / "data.jsonl", *map(json.dumps, rows[:2]))
    same = replace(task, prompt_data=f"{tmp_path / 'data.parquet'}@[:2]")
    asked, expected = (PromptSource(config(each), tokenizer).take(2, 0) for each in (same, task))
    assert asked == expected
    with pytest.raises(ConfigError, match=r"data\.parquet:3: must have the key 'label'"):
        PromptSource(config(replace(same, prompt_data=str(tmp_path / "data.parquet"))), tokenizer)
    (tmp_path / "data.parquet").write_bytes(b"PAR1" + bytes(range(256)) + b"PAR1")
    with pytest.raises(ConfigError, match="must be a parquet file"):
        PromptSource(config(replace(same, prompt_data=str(tmp_path / "data.parquet"))), tokenizer)


def test_a_line_separator_inside_a_json_text_ends_no_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = jsonl(tmp_path / "data.jsonl", '{"prompt": "a\u2028b", "label": 1}')
    assert PromptSource(config(task), tokenizer).take(1, 0)[0].text == "a\u2028b"


def test_a_file_that_is_missing_empty_or_no_text_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        PromptSource(config(TaskConfig(prompt_data=str(tmp_path / "absent.jsonl"))), tokenizer)
    with pytest.raises(ConfigError, match="at least one prompt"):
        PromptSource(config(jsonl(tmp_path / "empty.jsonl", "", "")), tokenizer)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        PromptSource(config(TaskConfig(prompt_data=str(tmp_path / "binary.jsonl"))), tokenizer)


def test_a_rows_advice_becomes_plain_tokens_of_its_prompt_and_a_row_without_has_none(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "a", "label": 1, "old": "d e"},
        {"prompt": "b", "label": 2},
        {"prompt": "c", "label": 3, "old": ""},
    ]
    task = jsonl(tmp_path / "d.jsonl", *map(json.dumps, rows))
    prompts = PromptSource(config(replace(task, advice_key="old")), tokenizer).take(3, 0)
    advice = {prompt.text: prompt.advice_token_ids for prompt in prompts}
    assert advice == {"a": tokenizer.encode("d e", special=False), "b": (), "c": ()}
    assert all(prompt.advice_token_ids == () for prompt in PromptSource(config(task), tokenizer).take(3, 0))


@pytest.mark.parametrize(
    ("advice", "setting", "words"),
    [(3, "task.prompt_data", ":1: 'old' must be a text"), (None, "task.advice_key", "no line of")],
)
def test_advice_that_is_no_text_or_that_no_row_has_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, advice: object, setting: str, words: str
) -> None:
    task = jsonl(tmp_path / "d.jsonl", json.dumps({"prompt": "a", "label": 1, "old": advice}))
    with pytest.raises(ConfigError) as caught:
        PromptSource(config(replace(task, advice_key="old")), tokenizer)
    assert caught.value.setting == setting
    assert words in caught.value.rule
