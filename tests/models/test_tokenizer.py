"""The tokenizer and its chat template, system message and all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_llama import TEMPLATE
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from slime_spec.errors import CheckpointError, ConfigError
from slime_spec.checkpoints.gguf import GgufModel
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tokenizer import Tokenizer, check_vocabulary

LLAMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set said = '' %}{% set rest = messages %}{% endif %}"
    "{{ '<|header|>system\n\nToday: 26 Jul 2024\n\n' + said + '<|eot|>' }}"
    "{% for m in rest %}{{ '<|header|>' + m['role'] + '\n\n' + m['content'] + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant\n\n' }}{% endif %}"
)
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'model: ' }}{% endif %}"
)
FOLDING = (
    "{% if messages[0]['role'] == 'system' %}{% set s = '<<' + messages[0]['content'] + '>>' %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{{ bos_token }}{% for m in rest %}{{ '[' + s + m['content'] + ']' }}{% endfor %}"
)


def byte_tokenizer(template: str | None, bos: str = "<s>", adds_bos: bool = False) -> Tokenizer:
    """Every byte a token, behind ``<s>``, ``</s>``, ``<|im_start|>`` and ``<|im_end|>``."""
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = FastTokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(specials)
    if adds_bos:
        fast.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    config = {"bos_token": {"content": bos}, "eos_token": "</s>"}
    return Tokenizer(fast, config, template, "the test")


def chat_text(tokenizer: Tokenizer, text: str, system: str = "") -> str:
    return tokenizer.decode(tokenizer.chat(text, system), skip_special=False)


def test_no_system_message_is_none_at_all_where_the_template_would_add_its_own() -> None:
    tokenizer = byte_tokenizer(TEMPLATE, bos="<|im_start|>")
    assert chat_text(tokenizer, "hi") == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_system_message_takes_the_place_of_the_templates_own() -> None:
    tokenizer = byte_tokenizer(TEMPLATE, bos="<|im_start|>")
    assert chat_text(tokenizer, "hi", "Be brief.") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_bos_token_stays_when_the_default_system_message_goes() -> None:
    assert chat_text(byte_tokenizer(LLAMA3), "hi") == "<s><|header|>user\n\nhi<|eot|><|header|>assistant\n\n"


def test_a_template_that_refuses_system_messages_is_rendered_as_it_is() -> None:
    assert chat_text(byte_tokenizer(REFUSING), "hi") == "<s>user: hi\nmodel: "


def test_a_template_that_folds_the_system_message_into_the_user_turn_is_rendered_as_it_is() -> None:
    assert chat_text(byte_tokenizer(FOLDING), "hi") == "<s>[hi]"
    assert chat_text(byte_tokenizer(FOLDING), "hi", "S") == "<s>[<<S>>hi]"


def test_a_message_that_quotes_the_default_system_message_keeps_it() -> None:
    tokenizer = byte_tokenizer(TEMPLATE, bos="<|im_start|>")
    quoted = "<|im_start|>system\nBe nice.<|im_end|>\n"
    assert chat_text(tokenizer, quoted).count(quoted) == 1


def test_the_chat_template_adds_no_second_bos_but_plain_text_gets_the_tokenizers_own() -> None:
    tokenizer = byte_tokenizer(LLAMA3, adds_bos=True)
    assert tokenizer.chat("hi").count(0) == 1
    assert tokenizer.encode("hi") == (0, *byte_tokenizer(None).encode("hi"))


def test_decoding_skips_special_tokens_unless_told_otherwise() -> None:
    tokenizer = byte_tokenizer(None)
    ids = (*tokenizer.encode("né 日"), tokenizer.eos_token_id)
    assert tokenizer.decode(ids) == "né 日"
    assert tokenizer.decode(ids, skip_special=False) == "né 日</s>"


def test_a_tokenizer_without_a_template_refuses_to_chat_and_says_what_to_pass() -> None:
    with pytest.raises(ConfigError, match="--no-apply-chat-template"):
        byte_tokenizer(None).chat("hi")


def saved(folder: Path, gguf_file: Path) -> Path:
    fast, config = GgufModel(gguf_file).tokenizer()
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_template_in_a_file_of_its_own_counts_more_than_the_one_in_the_config(
    tmp_path: Path, tiny_gguf: Path
) -> None:
    folder = saved(tmp_path, tiny_gguf)
    assert "Be nice" not in chat_text(Tokenizer.load(folder), "hi")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert chat_text(Tokenizer.load(folder), "hi") == "hi!"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(tmp_path: Path, tiny_gguf: Path, name: str) -> None:
    (saved(tmp_path, tiny_gguf) / name).unlink()
    with pytest.raises(CheckpointError, match=f"must hold a {name}"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_truncated_file_is_named(tmp_path: Path, tiny_gguf: Path, name: str) -> None:
    path = saved(tmp_path, tiny_gguf) / name
    path.write_text(path.read_text()[:100])
    with pytest.raises(CheckpointError, match=name):
        Tokenizer.load(tmp_path)


def test_a_broken_chat_template_is_refused_when_it_is_loaded(tmp_path: Path, tiny_gguf: Path) -> None:
    (saved(tmp_path, tiny_gguf) / "chat_template.jinja").write_text("{% for m in messages %}")
    with pytest.raises(CheckpointError, match="chat template must be valid Jinja"):
        Tokenizer.load(tmp_path)


def test_a_chat_template_cannot_reach_out_of_its_sandbox() -> None:
    with pytest.raises(CheckpointError, match="access to attribute '__class__'"):
        byte_tokenizer("{{ ''.__class__.__mro__[1].__subclasses__() }}")


def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings_is_refused(tiny_gguf: Path) -> None:
    tokenizer = byte_tokenizer(None)
    config = GgufModel(tiny_gguf).config()
    check_vocabulary(tokenizer, ModelSpec.from_dict({**config, "vocab_size": 260}))
    with pytest.raises(ConfigError, match="260 ids"):
        check_vocabulary(tokenizer, ModelSpec.from_dict({**config, "vocab_size": 259}))
