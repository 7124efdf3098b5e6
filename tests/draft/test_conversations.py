"""A corpus of conversations: what becomes of a file of SpecForge's, and drafts trained on and judged by such files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.draft.training.sequence import is_held_out, read_corpus
from slime_spec.errors import ConfigError
from slime_spec.launch.draft.command import run_draft
from slime_spec.launch.draft.conversations import read_conversations
from tests.support.chat_templates import LLAMA3_1, QWEN2_5, save_tokenizer
from tests.support.tiny_policy import make_tiny_policy

LAYERS = ["--capture-layers", "0", "1", "2"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy") / "tiny", num_hidden_layers=4)


def written(path: Path, *conversations: Any) -> Path:
    path.write_text("".join(json.dumps({"id": "1", "conversations": each}) + "\n" for each in conversations))
    return path


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def test_every_reply_is_a_sequence_whose_prompt_is_all_before_it(tmp_path: Path) -> None:
    """Qwen2.5's template puts its own system turn first; its turns end in <|im_end|>, which ends the reply."""
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path, QWEN2_5))
    chat = said("2 + 3?", "It is 5.", "And 4?", "6")
    sequences = read_conversations(written(tmp_path / "c.jsonl", chat), tokenizer, 2048)
    assert [each.kind for each in sequences] == ["conversation"] * 2
    for sequence, num_before, reply in zip(sequences, (1, 3), ("It is 5.", "6"), strict=True):
        assert sequence.prompt == tokenizer.chat(chat[:num_before])
        assert tokenizer.decode(sequence.reply, skip_special=False).startswith(reply)
        assert sequence.reply[-1] in tokenizer.end_token_ids
        assert not set(sequence.reply[:-1]) & tokenizer.end_token_ids


def test_sharegpts_spelling_means_the_same(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path, QWEN2_5))
    theirs = [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]
    first, second = (
        read_conversations(written(tmp_path / "c.jsonl", chat), tokenizer, 2048)
        for chat in (said("2 + 3?", "5"), theirs)
    )
    assert first == second


def test_sequences_are_cut_and_those_without_room_are_left_out_with_a_count(
    policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tiny policy's tokens are bytes, and its template puts a colon after the prompt."""
    tokenizer = Tokenizer.load(policy)
    path = written(tmp_path / "c.jsonl", said("abc", "defghij"), said("abcdefg", "h"))
    (sequence,) = read_conversations(path, tokenizer, 7)
    assert tokenizer.decode(sequence.token_ids) == "abc:def"
    assert sequence.prompt_len == 4
    assert "left out replies without room for two tokens" in caplog.text
    assert "replies=1" in caplog.text
    (short, whole) = read_conversations(path, tokenizer, 100)
    assert tokenizer.decode(short.reply, skip_special=False) == "defghij<|end|>"
    assert whole.index == 1


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"messages": said("a", "b")}, r"c\.jsonl:1: must have a list of messages under 'conversations'"),
        ({"conversations": []}, "must have a list of messages"),
        ({"conversations": ["a"]}, r"c\.jsonl:1: a message must have a role and a text"),
        ({"conversations": [{"role": "user", "content": None}]}, "a message must have a role and a text"),
        ({"conversations": said("a")}, "must hold a reply of an assistant that fits into 64 tokens"),
        ({"conversations": [{"role": "judge", "content": "a"}, *said("a", "b")[1:]]}, "render these messages: Unknown"),
    ],
)
def test_a_broken_conversation_is_one_error_with_its_line(row: object, rule: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path, LLAMA3_1))
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=rule):
        read_conversations(tmp_path / "c.jsonl", tokenizer, 64)


@pytest.mark.parametrize("kind", ["eagle3", "dflash"])
def test_eval_finds_of_the_replies_held_out_what_the_training_found(kind: str, policy: Path, tmp_path: Path) -> None:
    chats = [said(f"count from {i}", " ".join(str(i + k) for k in range(8))) for i in range(24)]
    out, report = tmp_path / "draft", tmp_path / "report.json"
    argv = ["train", "--target", str(policy), "--out", str(out), *LAYERS, "--kind", kind, "--epochs", "2"]
    argv += ["--dtype", "float32", "--draft-dtype", "float32", "--held-out-percent", "40", "--draft-vocab-size", "64"]
    assert run_draft([*argv, "--conversations", str(written(tmp_path / "all.jsonl", *chats))]) == 0
    tokenizer = Tokenizer.load(policy)
    held_out = [chat for chat in chats if is_held_out(tokenizer.chat(chat[:1]), 40)]
    assert 2 <= len(held_out) <= 20
    trained = json.loads((out / "held_out.json").read_text())
    assert trained["conversation"]["sequences"] == len(held_out)
    provenance = json.loads((out / "provenance.json").read_text())
    assert "replies of a file of conversations" in provenance["licence"]
    assert provenance["corpus"]["num_sequences"] == len(chats) - len(held_out)
    assert len(list(read_corpus(out / "corpus.jsonl"))) == len(chats)

    path = written(tmp_path / "some.jsonl", *held_out)
    argv = ["eval", "--target", str(policy), "--draft", str(out), "--conversations", str(path)]
    assert run_draft([*argv, "--dtype", "float32", "--json", str(report)]) == 0
    found = json.loads(report.read_text())["conversation"]
    expected = trained["conversation"]
    assert found.keys() == expected.keys()
    assert found["tokens_per_verify"] == expected["tokens_per_verify"]
    assert found["conditional"] == expected["conditional"]
    assert found["acceptance_rate"] == pytest.approx(expected["acceptance_rate"], abs=2e-4)


def test_eval_judges_the_replies_that_the_target_gives(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--num-prompts", "20", "--max-new-tokens", "8", "--chat-share", "0", "--greedy-share", "1"]
    out, report = tmp_path / "draft", tmp_path / "report.json"
    argv = ["train", "--target", str(policy), "--out", str(out), *LAYERS, *small, "--minutes", "0"]
    assert run_draft([*argv, "--draft-vocab-size", "64"]) == 0
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(20)))
    argv = ["eval", "--target", str(policy), "--draft", str(out), *small, "--json", str(report)]
    assert run_draft([*argv, "--prompt-data", str(tmp_path / "prompts.jsonl"), "--num-positions", "2"]) == 0
    found = json.loads(report.read_text())
    assert found.keys() == {"task greedy"}
    assert len(found["task greedy"]["conditional"]) == 2
    assert "acceptance of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--conversations", "c.jsonl", "--prompt-data", "d.jsonl"], "--conversations: a corpus has one source"),
        (["--max-length", "64"], "--max-length: is of --conversations"),
        (["--num-positions", "0"], "--num-positions: must be from 1 to 127"),
        (["--conversations", "nowhere.jsonl"], "--conversations: must be a file that is there"),
        (["--draft", "builtin:nothing"], "nothing"),
        ([], "choose a draft made for this target"),
        (["--epochs", "3"], "unrecognized arguments: --epochs"),
    ],
)
def test_bad_options_of_eval_are_refused(flags: list[str], rule: str, policy: Path) -> None:
    with pytest.raises(ConfigError, match=rule):
        run_draft(["eval", "--target", str(policy), "--draft", "builtin:smollm2-135m-eagle3", *flags])
