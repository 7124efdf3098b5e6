"""Tiny checkpoint folders of every family and draft format, as the fuzzers of checkpoints damage them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import draft_shapes, save_draft_checkpoint
from slime_spec.checkpoints.families import dflash, dspark, eagle, eagle3, nextn
from slime_spec.checkpoints.families.draft_format import DraftFamily
from slime_spec.checkpoints.families.family import Family
from slime_spec.checkpoints.families.mimo import MIMO
from slime_spec.checkpoints.folder import CONFIG, INDEX, SINGLE
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes, save_checkpoint
from slime_spec.files import write_whole

END = "<|end|>"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}:"
SIZES: Mapping[str, Any] = {
    **{"vocab_size": 272, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    },
    **{
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 256,
        "dtype": "float32",
    },
}
BLOCK = {**SIZES, "num_hidden_layers": 1}
DRAFTS: Mapping[DraftFamily, dict[str, Any]] = {
    "eagle3": {
        **BLOCK,
        "architectures": [eagle3.ARCHITECTURE],
        "draft_vocab_size": 64,
        "eagle_config": {eagle3.CAPTURED: [0, 1, 2], "use_aux_hidden_state": True, "norm_before_fc": True},
        "fc_norm": True,
    },
    "eagle": {**BLOCK, "architectures": [eagle.ON_LLAMA], "bias": True},
    "mtp": {**BLOCK, "architectures": [nextn.ARCHITECTURE], "num_nextn_predict_layers": 1},
    "dflash": {
        **BLOCK,
        "architectures": [dflash.ARCHITECTURE],
        "num_hidden_layers": 2,
        dflash.BLOCK: 4,
        dflash.NESTED: {dflash.MASK: 271, dflash.LAYERS: [0, 2]},
    },
    "dspark": {
        **BLOCK,
        "architectures": [dspark.ARCHITECTURE],
        "num_hidden_layers": 2,
        dflash.BLOCK: 4,
        dflash.NESTED: {dflash.MASK: 271, dflash.LAYERS: [0, 2], dspark.RANK: 6, dspark.KIND: "vanilla"},
    },
}


def make_target(folder: Path, family: Family, is_sharded: bool = False, **changes: Any) -> Path:
    """Write a whole checkpoint: weights (in one file or two), tokenizer and the settings of generation."""
    config = {**SIZES, "architectures": [family.architecture], "model_type": family.model_type, **changes}
    if family is MIMO:
        config["num_nextn_predict_layers"] = 1
    spec = ModelSpec.from_dict(config)
    tensors = _random(expected_shapes(spec))
    if family is MIMO:
        tensors |= _random(draft_shapes(DraftSpec.from_dict(config, spec)))
    save_checkpoint(folder, tensors.items(), config)
    if is_sharded:
        _shard(folder, tensors)
    _make_tokenizer(folder)
    write_whole(folder / "generation_config.json", json.dumps({"eos_token_id": [256], "do_sample": True}))
    return folder


def make_draft(folder: Path, family: DraftFamily, target: ModelSpec) -> Path:
    """Write a draft network."""
    config = DRAFTS[family]
    spec = DraftSpec.from_dict(config, target)
    is_reduced = spec.draft_vocab_size < target.vocab_size
    save_draft_checkpoint(folder, spec, _random(draft_shapes(spec)), torch.arange(0, 128, 2) if is_reduced else None)
    write_whole(folder / CONFIG, json.dumps(config))
    return folder


def _random(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) + (len(shape) == 1) for name, shape in shapes.items()}


def _shard(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace the file of weights by two and their index."""
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for place in set(places.values()):
        save_file({name: tensors[name] for name in places if places[name] == place}, folder / place)
    write_whole(folder / INDEX, json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    (folder / SINGLE).unlink()


def add_older_files(folder: Path) -> Path:
    """Write the files that a tokenizer's folder may have beside its two."""
    write_whole(folder / "special_tokens_map.json", json.dumps({"eos_token": END}))
    write_whole(folder / "added_tokens.json", json.dumps({END: 256}))
    write_whole(folder / "chat_template.jinja", TEMPLATE)
    return folder


def _make_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate([*alphabet, END])}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([END])
    fast.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": END, "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_whole(folder / "tokenizer_config.json", json.dumps(settings))
