"""Damaged and odd rows of data go through the calls of a launch's preflight, and on into rewards and samples.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slime_spec.bench.robustness.fuzzer import Case, Kind, NanAnswer
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config, RolloutConfig, TaskConfig
from slime_spec.draft.training.sequence import read_corpus as read_sequences
from slime_spec.errors import ConfigError
from slime_spec.rl.samples_file import append_samples
from slime_spec.speculation.corpus import read_corpus as read_documents
from slime_spec.tasks.source import PromptSource
from slime_spec.types import GeneratedSample

TEMPLATES = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + ';' }}{% endfor %}a:",
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}",
    "{% if messages[0].role != 'user' %}{{ raise_exception('no user') }}{% endif %}{{ messages[-1].content[:40] }}"
    "{{ messages | length / (messages | length - 3) }}",
    None,
)
TEXTS = (
    *("", " ", "5", "-5", "+5", "5.0", "1_0", "1,000", "²", "٣", "½", "NaN", "inf", "null", "a" * 5_000, "9" * 5_000),
    *(
        "\0",
        "\x1b[31m",
        "\r\n",
        "\u2028",
        "\ufeff",
        "\u202e",
        "\ud83d",
        "\udc00 x",
        "a\ud83d\ude00b",
        "日本語",
        "🙂",
        "</s>",
    ),
    *("{{ 7 * 7 }}", "{% raw %}", "%s", "{0}", "[[[", "[{}]", '[{"type": "function"}]', '["\\ud800"]', "[" * 20_000),
)
NUMBERS = (0, -0.0, 5, 5.0, 1.5, -1, 2**63, 10**400, 1e308, math.nan, math.inf, -math.inf, True, False, None)
# JSON as no encoder writes it.
RAW = (
    *(
        "NaN",
        "-Infinity",
        "1e400",
        "-1e999",
        "9" * 5_000,
        "-" + "9" * 5_000,
        "1." + "0" * 5_000,
        "01",
        "1e",
        ".5",
        "+1",
    ),
    *(
        '"\\ud83d"',
        '"\\uDC00x"',
        '"\\u0000"',
        '"\\x41"',
        '"\x00"',
        '"\t"',
        "'a'",
        "{",
        "[",
        "]",
        "",
        "nul",
        "undefined",
    ),
    *(
        "[" * 100_000,
        "[" * 500 + "]" * 500,
        "[" * 2_500 + "]" * 2_500,
        '{"a":' * 400 + "1" + "}" * 400,
        '{"a":1,"a":2}',
    ),
)
SEPARATORS = (
    *(b"\n", b"\r\n", b"\n\n", b"\n \t\n") * 6,
    b"\r",
    b"",
    b"\x0b",
    b"\xe2\x80\xa8",
    b"\n\xef\xbb\xbf",
)
REPLIES = ("5", "It is -1,000.5", "9" * 5_000, "٣", "", "\0")
LONGEST_ERROR = 2_000  # bytes
KEYS = ("prompt", "label", "old", "tools")


class Rows:
    """Fuzzes data files of prompts; every eighth file is a corpus of a drafter."""

    def __init__(self, folder: Path) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        fast = FastTokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        self._folder, self._fast = folder, fast
        self._file = folder / "data.jsonl"
        self._tokenizers = [self._tokenizer(template) for template in TEMPLATES]

    def make(self, random: Random) -> Case[tuple[str, TaskConfig, int, bytes]]:
        reader = random.choice(("prompts",) * 7 + (random.choice(("documents", "sequences")),))
        rows = [ROWS[reader](random) for _ in range(random.choice((1, 1, 2, 3, 8)))]
        lines = [_line(random, row) for row in rows]
        content = random.choice(SEPARATORS).join(lines) + random.choice((b"\n", b"\n", b""))
        for _ in range(random.choice((0, 0, 0, 0, 1, 3))):
            content = random.choice(DAMAGES)(random, content)
        task, template = _task(random), random.choice((0, 0, 1, 1, 2, 3))
        shown = content if len(content) <= 300 else content[:200] + b"..." + content[-80:]
        return Case(f"{reader} {shown!r} of {len(content)} bytes, {task}", (reader, task, template, content))

    def attempt(self, case: Case[tuple[str, TaskConfig, int, bytes]]) -> bool:
        self._file.write_bytes(case.value[-1])
        try:
            return self._read(*case.value)
        except ConfigError as error:
            self._check_words(str(error))
            raise

    def _check_words(self, refusal: str) -> None:
        assert len(refusal.encode()) < LONGEST_ERROR, f"a refusal in {len(refusal)} characters"
        assert self._file.name in refusal or "--" in refusal, f"a refusal names the file or a flag: {refusal}"

    def _read(self, reader: str, task: TaskConfig, template: int, _: bytes) -> bool:
        if reader == "documents":
            return bool(read_documents(str(self._file), lambda text: tuple(text.encode()), 100_000, vocab_size=256))
        if reader == "sequences":
            return all(each.reply is not None for each in read_sequences(self._file))
        task = replace(task, prompt_data=f"{self._file}{task.prompt_data}")
        config = Config(task=task, rollout=RolloutConfig(max_prompt_len=3_000))
        self._use(PromptSource(config, self._tokenizers[template]))
        return True

    def close(self) -> None:
        pass

    def _use(self, source: PromptSource) -> None:
        """Do with accepted prompts what a run does: show one, score replies, write samples."""
        source.first_shown().encode()
        samples = []
        for prompt, reply in zip(source.take(len(REPLIES), 0), REPLIES, strict=True):
            assert prompt.token_ids, "an accepted prompt has tokens"
            f"{prompt.text}{prompt.answer}".encode()
            response = GeneratedSample("0", 0, tuple(reply.encode()), (-1.0,) * len(reply.encode()), "stop", 0, 1)
            (sample,) = source.score(prompt, [response])()
            if sample.reward is None or not math.isfinite(sample.reward):
                raise NanAnswer(f"the reward of {reply[:20]!r} is {sample.reward}: {sample.error}")
            samples.append(sample)
        path = self._folder / "samples.jsonl"
        path.unlink(missing_ok=True)
        append_samples(path, 0, samples)
        assert len(path.read_text(encoding="utf-8").splitlines()) >= len(samples), "a line for each sample"

    def _tokenizer(self, template: str | None) -> Tokenizer:
        return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=self._fast, chat_template=template), "the fuzzer")


def _task(random: Random) -> TaskConfig:
    """Make the settings of a data file; prompt_data is what stands behind the file's name."""
    templated = random.random() < 0.8
    return TaskConfig(
        prompt_data=random.choice(("",) * 30 + ("@[0:1]", "@[-1:]", "@[:]", "@[9:]", "@[1:0]", "@[x:]")),
        input_key=random.choice(("prompt",) * 30 + (*KEYS, "absent", "")),
        label_key=random.choice(("label",) * 30 + (*KEYS, "absent")),
        advice_key=random.choice((None,) * 12 + ("old",) * 8 + ("absent",)),
        tool_key=random.choice((None, None, "tools")),
        reward=random.choice(("exact", "contains", "last_integer")),
        system_prompt=random.choice(("", "", "Be brief.")) if templated else "",
        apply_chat_template=templated,
        refuse_overlong_prompts=random.random() < 0.2,
    )


def _prompt_row(random: Random) -> Any:
    chat = [
        {"role": role, "content": "2 + 3?"} for role in random.choice((("user",), ("system", "user"), ("user",) * 4))
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    return {
        "prompt": random.choice(("What is 2 + 3?", chat)),
        "label": random.choice((5, "5")),
        "old": "5",
        "tools": tools,
    }


def _document_row(random: Random) -> Any:
    return random.choice(("a text", [1, 2, 255], "", []))


def _sequence_row(random: Random) -> Any:
    return {"index": random.randrange(9), "token_ids": [1, 2, 3, 4], "prompt_len": 2, "kind": "task greedy"}


ROWS: dict[str, Callable[[Random], Any]] = {
    "prompts": _prompt_row, "documents": _document_row, "sequences": _sequence_row,
}  # fmt: skip


def _line(random: Random, row: Any) -> bytes:
    """Write a row, often with hostile values, now and then with a value that no encoder writes."""
    for _ in range(random.choice((0, 0, 0, 0, 1, 1, 2))):
        row = _changed(random, row)
    mark = "<raw>"
    if random.random() < 0.1:
        row = _placed(random, row, mark)
    text = json.dumps(row, ensure_ascii=random.random() < 0.9).replace(json.dumps(mark), random.choice(RAW), 1)
    return text.encode("utf-8", "surrogatepass")


def _changed(random: Random, row: Any) -> Any:
    value: Any = random.choice((*TEXTS, *NUMBERS, [], {}, [{}], {"a": [1]}, [None], [["user"]], [{"role": "user"}]))
    return _placed(random, row, value)


def _placed(random: Random, row: Any, value: Any) -> Any:
    """Return ``row`` with ``value`` at some place of it: for the whole, for an element, or under another key."""
    if isinstance(row, dict) and row and random.random() < 0.95:
        key = random.choice(list(row))
        if random.random() < 0.1:
            return {**row, random.choice(TEXTS[:20]): row[key]}
        deeper = random.random() < 0.5 and isinstance(row[key], dict | list)
        return {**row, key: _placed(random, row[key], value) if deeper else value}
    if isinstance(row, list) and row and random.random() < 0.95:
        at = random.randrange(len(row))
        return [*row[:at], _placed(random, row[at], value) if random.random() < 0.7 else value, *row[at + 1 :]]
    return value


def _flipped(random: Random, content: bytes) -> bytes:
    at = random.randrange(len(content) + 1)
    return content[:at] + bytes([random.randrange(256)]) + content[at + 1 :]


def _inserted(random: Random, content: bytes) -> bytes:
    at = random.randrange(len(content) + 1)
    odd = (
        b"\x00",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\n",
        b"\r",
        b'"',
        b"\\",
        b"}",
        b"\\ud800",
        b"\xc3",
        b" " * 9_000,
    )
    return content[:at] + random.choice(odd) + content[at:]


DAMAGES: tuple[Callable[[Random, bytes], bytes], ...] = (
    _flipped,
    _flipped,
    _inserted,
    _inserted,
    lambda random, content: content[: random.randrange(len(content) + 1)],
    lambda random, content: content[random.randrange(len(content) + 1) :],
    lambda random, content: content + content,
    lambda random, content: b"\xef\xbb\xbf" + content,
    lambda random, content: content.decode("utf-8", "replace").encode(random.choice(("utf-16", "utf-32", "utf-16-le"))),
    lambda random, content: random.randbytes(random.randrange(300)),
)

measure = Kind("rows", "files of rows: prompts, and corpora of drafters", 5_000, Rows).measure
