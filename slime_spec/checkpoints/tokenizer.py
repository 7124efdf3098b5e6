"""``Tokenizer`` reads a checkpoint's tokenizer and chat template without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from slime_spec.checkpoints.folder import AGAIN, REMEDIES, TARGET_PATH, CheckpointFolder
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.errors import CheckpointError, ConfigError


class Tokenizer:
    """A tokenizer converts text to token ids and back. Example::

    tokenizer = Tokenizer.load("models/SmolLM2-135M-Instruct")
    ids = tokenizer.chat("What is 2 + 3?")  # (1, 4093, 198, ...), ending where the assistant begins
    tokenizer.decode(ids)
    """

    def __init__(self, fast: FastTokenizer, config: dict[str, Any], chat_template: str | None, source: str) -> None:
        self._fast = fast
        self._source = source
        self._specials = {key: _content(config.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
        self._template = _compiled(chat_template, source) if chat_template else None
        self._unasked_turn = self._default_system_turn() if self._template else ""

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja where it is a file of its own.

        Raises CheckpointError naming the file that is missing or damaged.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(TARGET_PATH, "must hold a tokenizer.json", str(folder), REMEDIES[TARGET_PATH])
        try:
            fast = FastTokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # noqa: BLE001 - the Rust parser raises bare Exception, and nothing narrower
            raise CheckpointError(str(path), f"must be a tokenizer: {error}", path.name, AGAIN) from None
        config = CheckpointFolder(Path(folder)).json("tokenizer_config.json")
        separate = Path(folder) / "chat_template.jinja"
        template = separate.read_text(encoding="utf-8") if separate.is_file() else config.get("chat_template")
        return cls(fast, config, template, str(folder))

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included."""
        return max(self._fast.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos_token_id(self) -> int | None:
        eos = self._specials["eos_token"]
        return self._fast.token_to_id(eos) if eos else None

    def encode(self, text: str, special: bool = True) -> tuple[int, ...]:
        """Ids of plain text, with what the tokenizer itself adds (Llama's BOS; nothing for SmolLM2) if ``special``."""
        return tuple(self._fast.encode(text, add_special_tokens=special).ids)

    def chat(self, text: str, system: str = "") -> tuple[int, ...]:
        """Ids of one user message in the chat template, ending with the opening of the assistant's turn.

        ``system=""`` means no system message at all, also where the template would put its own default one.
        """
        if self._template is None:
            raise ConfigError(
                "task.apply_chat_template",
                "needs a checkpoint with a chat template",
                self._source,
                "Pass --no-apply-chat-template, or an instruction-tuned checkpoint.",
            )
        user = {"role": "user", "content": text}
        if system:
            rendered = self._render([{"role": "system", "content": system}, user])
        else:
            rendered = self._render([user]).replace(self._unasked_turn, "", 1)
        return tuple(self._fast.encode(rendered, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._fast.decode(list(ids), skip_special_tokens=skip_special)

    def _render(self, messages: list[dict[str, str]], prompt: bool = True) -> str:
        assert self._template is not None, "chat() refuses a tokenizer without a template"
        return self._template.render(messages=messages, add_generation_prompt=prompt, **self._specials)

    def _default_system_turn(self) -> str:
        """The text (without BOS) that the template puts before the first user turn, found by comparing renderings."""
        user, system = {"role": "user", "content": "x"}, {"role": "system", "content": "y"}
        try:
            plain = self._render([user])
        except TemplateError as error:
            raise CheckpointError(
                self._source, f"its chat template must render a user's message: {error}", "chat_template", AGAIN
            ) from None
        try:
            system_turn = self._render([system], prompt=False)
            whole = self._render([system, user])
        except TemplateError:
            return ""  # a template that refuses system messages has no default one
        user_turn = whole.removeprefix(system_turn)
        if user_turn == whole or not plain.endswith(user_turn):
            return ""
        bos = self._specials["bos_token"]
        unasked = plain.removesuffix(user_turn)
        # SmolLM2 names as BOS the token that opens every turn; then it is part of the turn, not of the text.
        return unasked if bos and user_turn.startswith(bos) else unasked.removeprefix(bos)


def check_vocabulary(tokenizer: Tokenizer, spec: ModelSpec) -> None:
    """Refuse a tokenizer that produces ids the model has no embedding for."""
    if tokenizer.vocab_size > spec.vocab_size:
        raise ConfigError(
            "model.hf_checkpoint",
            f"its tokenizer's ids must lie below the model's vocabulary size {spec.vocab_size}",
            f"{tokenizer.vocab_size} ids",
            "Use the tokenizer files that belong to these weights.",
        )


def _content(token: str | dict[str, Any] | None) -> str:
    """A special token is written as its text, or as an object with its text under ``content``."""
    return token["content"] if isinstance(token, dict) else (token or "")


def _compiled(chat_template: str, source: str) -> Template:
    """Compile with the settings and helpers that chat templates are written for, in a sandbox: a checkpoint is data."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(chat_template)
    except TemplateError as error:
        raise CheckpointError(
            source, f"its chat template must be valid Jinja: {error}", "chat_template", AGAIN
        ) from None


def _raise(message: str) -> None:
    raise TemplateError(message)
