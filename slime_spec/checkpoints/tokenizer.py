"""A Tokenizer is what a checkpoint's tokenizer.json says, with the chat template as transformers applies it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from slime_spec.checkpoints.folder import AGAIN, CheckpointFolder
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Ids that a vocabulary may leave out. What loads it lists every one: an id of 2^31 took minutes and gigabytes.
MOST_LEFT_OUT = 2**16
WITHOUT_CODE = "Remove auto_map where tokenizer.json is the whole tokenizer, or choose another checkpoint."
# Classes that put BOS before a plain text themselves, as SGLang has it: tokenizer.py of its hf_transformers.
PUT_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
# What a template that asks for today's date is told, so that a prompt is the same every day: Llama 3's own fallback.
DEFAULT_DATE = "2024-07-26"
SAID = "\u2042said\u2042"  # stands for an assistant's text in a template
# SGLang ends a reply at these added tokens too, whatever the checkpoint names: common.py of its hf_transformers.
TURN_FINAL = ("<|eom_id|>", "<|content_model_end_sampling|>", "<|ifm|im_end|>")
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # a byte that has no other token, in vocabularies of SentencePiece
# A chat template is a program: what it may raise, on messages that it was not written for.
OF_TEMPLATES = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


class Tokenizer:
    """A tokenizer converts text to token ids and back. Example::

    tokenizer = Tokenizer.load("models/SmolLM2-135M-Instruct")
    ids = tokenizer.chat("What is 2 + 3?")  # (1, 9690, 198, ...), ending where the assistant begins
    tokenizer.decode(ids)
    """

    def __init__(
        self,
        transformers_tokenizer: PreTrainedTokenizerFast,
        source: str,
        chat_date: str | None = None,
        template_values: Mapping[str, Any] | None = None,
    ) -> None:
        """Render a message on trial; raises CheckpointError for a chat template that cannot be used.

        ``chat_date`` (YYYY-MM-DD) is today for a template that asks for it, ``template_values`` are other names that it
        may read; ``source`` is named in errors.
        """
        self._hf = transformers_tokenizer
        self._source = source
        self._template_values = {**_date_values(chat_date), **(template_values or {})}
        if unread := [name for name in template_values or () if not self.template_reads(name)]:
            logger.warning("the chat template reads none of names=%s checkpoint=%s", ",".join(unread), source)
        self._hf.encode("")  # resets truncation and padding once: doing so later would race with other threads
        if self._hf.chat_template is not None:
            self.chat("x")

    @classmethod
    def load(
        cls, folder: str | Path, chat_date: str | None = None, template_values: Mapping[str, Any] | None = None
    ) -> Tokenizer:
        """Load a checkpoint folder's tokenizer; raises CheckpointError naming the file that is missing or damaged.

        tokenizer.json says how text is split, whatever class tokenizer_config.json names.
        """
        stored = CheckpointFolder(Path(folder))
        path = stored.file("tokenizer.json")
        settings = stored.json("tokenizer_config.json")
        if settings.get("auto_map"):
            rule = "must name no class of its own (auto_map): the code of a checkpoint is not run (trust_remote_code)"
            raise CheckpointError(str(stored.path / "tokenizer_config.json"), rule, "auto_map", WITHOUT_CODE)
        _check_ids(stored)
        from transformers import PreTrainedTokenizerFast  # takes seconds, which only a command that tokenizes shall pay

        try:
            # Not AutoTokenizer: transformers 5 gives the classes it chooses pre-tokenizers of their own, which drop
            # the spaces of DeepSeek-R1's distillations (LlamaTokenizerFast) and join SmolLM2's digits (GPT2Tokenizer).
            loaded = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            if str(settings.get("tokenizer_class")).removesuffix("Fast") in PUT_BOS:
                loaded.add_bos_token = settings.get("add_bos_token") is not False
            loaded.decode(loaded.encode("", verbose=False))  # settings of wrong types are not looked at before
        except Exception as error:  # noqa: BLE001 - the Rust parser raises bare Exception, and nothing narrower
            raise CheckpointError(str(path), f"must be a tokenizer: {error}", path.name, AGAIN) from None
        return cls(loaded, str(folder), chat_date, template_values)

    @property
    def vocab_size(self) -> int:
        """Return one more than the largest token id, added tokens included."""
        return max(self._hf.get_vocab().values()) + 1

    @cached_property
    def longest_token_bytes(self) -> int:
        """Return the bytes of the longest token, at least as many as its text has."""
        return max(len(token.encode()) for token in self._hf.get_vocab())

    @property
    def eos_token_id(self) -> int | None:
        eos: int | None = self._hf.eos_token_id
        return eos

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Return the tokens of which each ends a reply: the tokenizer's EOS, and turn-final tokens as SGLang has it."""
        named = {self.eos_token_id, *map(self._hf.get_added_vocab().get, TURN_FINAL)}
        return frozenset(each for each in named if each is not None)

    def added_token(self, token_id: int) -> str | None:
        """Return the text of a token that is no piece of text, such as ``<|im_end|>``; None for any other token."""
        return self._added_tokens.get(token_id)

    @cached_property
    def _added_tokens(self) -> dict[int, str]:
        return {token_id: token for token, token_id in self._hf.get_added_vocab().items()}

    @property
    def has_chat_template(self) -> bool:
        return self._hf.chat_template is not None

    @property
    def chat_template(self) -> str:
        """Return the text of the chat template, of all where there are several; nothing without one."""
        return str(self._hf.chat_template or "")

    def template_reads(self, name: str) -> bool:
        return re.search(rf"\b{re.escape(name)}\b", self.chat_template) is not None

    def encode(self, text: str, special: bool = True) -> tuple[int, ...]:
        """Return ids of plain text, with the tokenizer's additions (Llama's BOS; none for SmolLM2) if ``special``."""
        return tuple(self._hf.encode(text, add_special_tokens=special, verbose=False))

    def count_tokens(self, texts: Sequence[str], special: bool = True) -> list[int]:
        """Return how many ids ``encode`` gives for each text; on all cores at once."""
        encodings = self._hf.backend_tokenizer.encode_batch_fast([*texts], add_special_tokens=special)
        return [len(each) for each in encodings]

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        system: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        template_values: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[int, ...]:
        """Return the ids of a chat; see ``chat_text``."""
        return self.encode(self.chat_text(messages, system, tools, template_values), special=False)

    def chat_text(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        system: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        template_values: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Return the text of a chat in the chat template, ending with the opening of the assistant's turn.

        A text is one user message. ``system`` is put before messages that do not open with a system message of their
        own; without either, the template decides whether there is a system turn. ``tools`` are JSON schemas,
        ``template_values`` what else the template may look at, such as ``enable_thinking``.
        """
        if self._hf.chat_template is None:
            raise ConfigError(
                "task.apply_chat_template",
                "needs a checkpoint with a chat template",
                self._source,
                "Pass --no-apply-chat-template, or an instruction-tuned checkpoint.",
            )
        if taken := sorted(template_values.keys() & self._template_parameters):
            rule = "must be values that a chat template looks at, not how it is applied"
            raise ConfigError("chat_template_kwargs", rule, taken[0], "Leave it out.")
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else [*messages]
        if system and not (turns and turns[0].get("role") == "system"):
            turns.insert(0, {"role": "system", "content": system})
        try:
            text = self._hf.apply_chat_template(
                turns,
                tools=list(tools) or None,
                add_generation_prompt=True,
                tokenize=False,
                **{**self._template_values, **template_values},
            )
        except TemplateSyntaxError as error:
            raise self._template_error("be valid Jinja", error) from None
        except OF_TEMPLATES as error:
            what = "a user's message" if isinstance(messages, str) else "these messages"
            raise self._template_error(f"render {what}", error) from None
        assert isinstance(text, str), "tokenize=False"
        return text

    def rendered(self, turns: Sequence[Mapping[str, Any]]) -> str | None:
        """Return the text of a conversation that is over; None without a chat template that renders it."""
        if self._hf.chat_template is None:
            return None
        try:
            text = self._hf.apply_chat_template([*turns], tokenize=False, **self._template_values)
        except OF_TEMPLATES:
            return None
        assert isinstance(text, str), "tokenize=False"
        return text

    def after_assistant(self, messages: Sequence[Mapping[str, Any]], ended: bool) -> str:
        """Return what the chat template writes after an assistant's text: its end, ``messages``, the next opening.

        ``ended``: the assistant's text has its end token already. Raises CheckpointError for a template that writes a
        conversation otherwise once it goes on.
        """
        start: list[Mapping[str, Any]] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SAID}]
        try:
            text = self._hf.apply_chat_template(
                [*start, *messages], tokenize=False, add_generation_prompt=True, **self._template_values
            )
        except OF_TEMPLATES as error:
            raise self._template_error("render these messages", error) from None
        before, said, after = str(text).partition(SAID)
        if not said or (self.rendered(start) or "").partition(SAID)[0] != before:
            rule = "write what came before as it did before the messages"
            raise self._template_error(rule, ValueError("it writes something else"))
        if ended:
            end = next((each for each in self._end_texts if after.startswith(each)), "")
            return after[len(end) :]
        return after

    @cached_property
    def _end_texts(self) -> list[str]:
        return [self.decode([each], skip_special=False) for each in sorted(self.end_token_ids)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        text: str = self._hf.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, which may be part of a character's."""
        token = self._hf.convert_ids_to_tokens(token_id)
        text = self.decode([token_id], skip_special=False)
        if "\N{REPLACEMENT CHARACTER}" not in text or not isinstance(token, str):
            return text.encode()
        if BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        if all(char in self._byte_of for char in token):
            return bytes(self._byte_of[char] for char in token)
        return text.encode()

    @cached_property
    def _template_parameters(self) -> frozenset[str]:
        """Return the names that say how a template is applied, a template of the client's own among them."""
        return frozenset({*signature(self._hf.apply_chat_template).parameters, "messages", "strftime_now"})

    @cached_property
    def _byte_of(self) -> Mapping[str, int]:
        """Return the byte that each character stands for in a byte-level vocabulary."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return {char: byte for byte, char in bytes_to_unicode().items()}

    def _template_error(self, rule: str, error: Exception) -> CheckpointError:
        return CheckpointError(self._source, f"its chat template must {rule}: {error}", "chat_template", AGAIN)


def check_vocabulary(tokenizer: Tokenizer, spec: ModelSpec) -> None:
    """Refuse a tokenizer that produces ids the model has no embedding for."""
    if tokenizer.vocab_size > spec.vocab_size:
        raise ConfigError(
            "model.hf_checkpoint",
            f"its tokenizer's ids must lie below the model's vocabulary size {spec.vocab_size}",
            f"{tokenizer.vocab_size} ids",
            "Use the tokenizer files that belong to these weights.",
        )


def _check_ids(stored: CheckpointFolder) -> None:
    """Refuse a tokenizer.json whose ids lie far beyond the number of its tokens; raises CheckpointError."""
    data = stored.json("tokenizer.json")
    model, added = data.get("model"), data.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab)) if isinstance(vocab, list) else ())]
    ids += [each.get("id") for each in (added if isinstance(added, list) else ()) if isinstance(each, dict)]
    largest = max((each for each in ids if type(each) is int), default=0)
    if largest > (limit := len(ids) + MOST_LEFT_OUT):
        rule = f"must have ids up to {limit} for its {len(ids)} tokens"
        raise CheckpointError(str(stored.path / "tokenizer.json"), rule, largest, AGAIN)


def _date_values(chat_date: str | None) -> dict[str, Any]:
    """Return the names under which chat templates look for the date.

    ``strftime_now`` hides transformers' own, which reads the clock. ``date_string`` is defined
    only for a date that was asked for: a template's own default counts more than ours.
    """
    date = datetime.fromisoformat(chat_date or DEFAULT_DATE)
    return {"strftime_now": date.strftime} | ({"date_string": date.strftime("%d %b %Y")} if chat_date else {})
