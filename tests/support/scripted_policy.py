"""A policy that says what it is told to: after a script's first character come the script's pieces, then the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from tests.support.tiny_policy import EOS, make_tiny_policy

CERTAIN = 50.0  # the logit of what comes next over all others, before the norm makes it larger


def make_scripted_policy(folder: Path, scripts: Mapping[str, Sequence[str]], template: str) -> Path:
    """Each script is asked for by its character, when that is the last of a prompt; each piece is a token of its own.

    Attention and MLP add nothing, so a token's state is its own embedding, and the head says what follows which token.
    """
    pieces = list(dict.fromkeys(piece for script in scripts.values() for piece in script))
    vocab_size = 257 + len(pieces)
    make_tiny_policy(folder, vocab_size=vocab_size, hidden_size=vocab_size, num_hidden_layers=1, eos_token_id=256)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        weight.fill_(1.0 if "norm" in name else 0.0)
    weights["model.embed_tokens.weight"].copy_(torch.eye(vocab_size))
    ids = [tokenizer.token_to_id(piece) for piece in pieces]
    assert ids == list(range(257, vocab_size)), "every piece is a token"
    for character, script in scripts.items():
        said = [*tokenizer.encode(character).ids, *map(tokenizer.token_to_id, script), tokenizer.token_to_id(EOS)]
        for before, after in pairwise(said):
            weights["lm_head.weight"][after, before] = CERTAIN
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
