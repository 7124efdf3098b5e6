"""The external corpus of NGRAM: what a line may be, and what is refused by its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime_spec.errors import ConfigError
from slime_spec.speculation.corpus import read_corpus


def encode(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def corpus(folder: Path, text: str, max_tokens: int = 100) -> list[tuple[int, ...]]:
    path = folder / "corpus.jsonl"
    path.write_text(text, encoding="utf-8")
    return read_corpus(str(path), encode, max_tokens, vocab_size=128)


def test_a_line_is_a_text_or_token_ids_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    assert corpus(tmp_path, '"ab"\n\n[1, 2, 127]\n""\n[]\n') == [(97, 98), (1, 2, 127)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"a"\n{"text": "b"}\n', "corpus.jsonl:2: must be a text or a list of token ids"),
        ("[1, true]\n", "corpus.jsonl:1: must be a text or a list"),
        ("[1\n", "corpus.jsonl:1: must be valid JSON"),
        ('"a"\n"\\ud83d"\n', "corpus.jsonl:2: must be text that can be encoded"),
        ("[1, " + "9" * 5000 + "]\n", "corpus.jsonl:1: must be valid JSON"),
        ("[" * 100_000 + "\n", "corpus.jsonl:1: must be JSON that is not nested"),
        ("[1]\n[128]\n", "corpus.jsonl:2: token ids must be from 0 to 127"),
        ("[-1]\n", "corpus.jsonl:1: token ids"),
        ('""\n', "at least one token"),
    ],
)
def test_what_is_no_document_is_refused_by_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        corpus(tmp_path, text)
    assert words in str(caught.value)


def test_a_corpus_beyond_its_bound_is_refused_and_not_cut(tmp_path: Path) -> None:
    assert corpus(tmp_path, "[1, 2]\n[3]\n", max_tokens=3) == [(1, 2), (3,)]
    with pytest.raises(ConfigError) as caught:
        corpus(tmp_path, "[1, 2]\n[3, 4]\n", max_tokens=3)
    assert caught.value.setting == "speculative.ngram_external_corpus_max_tokens"
    assert "corpus.jsonl:2" in caught.value.rule


def test_an_unreadable_corpus_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(ConfigError, match="must be a file that can be read"):
            read_corpus(str(path), encode, 9, 9)
    (tmp_path / "latin.jsonl").write_bytes(b'"\xe9"\n')
    with pytest.raises(ConfigError, match=r"latin\.jsonl:1: must be UTF-8"):
        read_corpus(str(tmp_path / "latin.jsonl"), encode, 9, 9)
