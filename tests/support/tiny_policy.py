"""A tiny random policy as a whole checkpoint folder, tokenizer included: what end-to-end runs train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.support.tiny_models import make_tiny_checkpoint

EOS = "<|end|>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}:"


def make_tiny_policy(folder: Path, **overrides: Any) -> Path:
    """A Llama of a few thousand parameters whose tokens are bytes; ``overrides`` change its config.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, EOS])}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([EOS])
    make_tiny_checkpoint(folder, **{"vocab_size": len(vocabulary), "eos_token_id": vocabulary[EOS], **overrides})
    fast.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": EOS, "chat_template": CHAT_TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
