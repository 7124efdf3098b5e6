"""Read NGRAM's external corpus: a jsonl file, each line a JSON string as for SGLang, or a list of token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from slime_spec.errors import ConfigError
from slime_spec.files import parse_json, shortened, text_lines

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
    for where, document in corpus_lines(path):
        token_ids = encode(document) if isinstance(document, str) else document
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            raise ConfigError(SETTING, f"{where}: token ids must be from 0 to {vocab_size - 1}", max(token_ids), LINE)
        num_tokens += len(token_ids)
        if num_tokens > max_tokens:
            raise ConfigError(
                "speculative.ngram_external_corpus_max_tokens",
                f"must hold the corpus, which has more by {where}",
                max_tokens,
                "Pass a larger --speculative-ngram-external-corpus-max-tokens, or a smaller corpus.",
            )
        if token_ids:
            documents.append(token_ids)
    if not documents:
        raise ConfigError(SETTING, "must hold at least one token", path, LINE)
    return documents


def corpus_lines(path: str) -> Iterator[tuple[str, str | tuple[int, ...]]]:
    """Yield (``file:line``, document) of every line that is not blank; raises ConfigError for what is no document."""
    for where, line in text_lines(Path(path), remedy=LINE):
        document = parse_json(line, where, remedy=LINE)
        if isinstance(document, list) and all(type(each) is int for each in document):
            document = tuple(document)
        if not isinstance(document, str | tuple):
            raise ConfigError(SETTING, f"{where}: must be a text or a list of token ids", shortened(line), LINE)
        yield where, document
