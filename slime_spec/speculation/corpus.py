"""Read NGRAM's external corpus: a jsonl file, each line a JSON string as for SGLang, or a list of token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from slime_spec.errors import ConfigError

SETTING = "speculative.ngram_external_corpus_path"
LINE = 'Write one JSON string a line ("text"), or one list of token ids ([1, 2]).'


def read_corpus(
    path: str, encode: Callable[[str], tuple[int, ...]], max_tokens: int, vocab_size: int
) -> list[tuple[int, ...]]:
    """Return the documents' token ids, empty ones left out; ``encode`` adds no special tokens.

    Raises ConfigError, naming the line, for a line that is no document, for a corpus of more than ``max_tokens``
    (SGLang does not cut a corpus either) and for one without a token.
    """
    documents, num_tokens = [], 0
    for number, document in corpus_lines(path):
        token_ids = encode(document) if isinstance(document, str) else document
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            raise ConfigError(
                SETTING, f"{path}:{number}: token ids must be from 0 to {vocab_size - 1}", max(token_ids), LINE
            )
        num_tokens += len(token_ids)
        if num_tokens > max_tokens:
            raise ConfigError(
                "speculative.ngram_external_corpus_max_tokens",
                f"must hold the corpus, which has more by line {number} of {path}",
                max_tokens,
                "Pass a larger --speculative-ngram-external-corpus-max-tokens, or a smaller corpus.",
            )
        if token_ids:
            documents.append(token_ids)
    if not documents:
        raise ConfigError(SETTING, "must hold at least one token", path, LINE)
    return documents


def corpus_lines(path: str) -> Iterator[tuple[int, str | tuple[int, ...]]]:
    """Yield (line number, document) of every line that is not blank; raises ConfigError for what is no document."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _document(line, f"{path}:{number}")
    except OSError as error:
        raise ConfigError(SETTING, f"must be a readable file: {error.strerror}", path, "Check the path.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(SETTING, f"must be UTF-8 text: {error}", path, "Convert the file to UTF-8.") from None


def _document(line: str, where: str) -> str | tuple[int, ...]:
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(SETTING, f"{where}: must be valid JSON: {error.msg}", line[:80], LINE) from None
    if isinstance(document, str):
        return document
    if isinstance(document, list) and all(type(each) is int for each in document):
        return tuple(document)
    raise ConfigError(SETTING, f"{where}: must be a text or a list of token ids", line[:80], LINE)
