"""The tokenizer and its chat template give the token ids that transformers gives, whatever the day."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer

from slime_spec.checkpoints.gguf import GgufModel
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tokenizer import Tokenizer, check_vocabulary
from slime_spec.errors import CheckpointError, ConfigError
from tests.support.chat_templates import LLAMA3_2, QWEN2_5, SPECIALS, TEMPLATES, save_tokenizer

USER = {"role": "user", "content": "What is 2 + 3? <né 日>"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <two> numbers — né.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
    },
}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one message": [USER],
    "system message": [SYSTEM, USER],
    "several turns": [SYSTEM, USER, {"role": "assistant", "content": "5"}, {"role": "user", "content": "Sure?"}],
    "a tool's answer": [USER, CALL, {"role": "tool", "content": "5"}],
}


def transformers_ids(folder: Path, messages: list[dict[str, Any]], tools: list[Any] | None, **values: Any) -> list[int]:
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False, **values
    )
    assert isinstance(ids, list)
    return ids


def text(tokenizer: Tokenizer, *chat: Any, **more: Any) -> str:
    return tokenizer.decode(tokenizer.chat(*chat, **more), skip_special=False)


@pytest.mark.parametrize("tools", [None, [TOOL], [TOOL, TOOL]], ids=["no tools", "a tool", "two tools"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_has_the_token_ids_of_transformers(
    name: str, chat: str, tools: list[Any] | None, tmp_path: Path
) -> None:
    folder = save_tokenizer(tmp_path, TEMPLATES[name], adds_bos=True)
    """As in case reports/01, where what a template writes before the first user turn was cut."""
    # These templates would ask the clock: transformers is given the documented date instead.
    values: dict[str, Any] = {}
    if name == "llama3.2":
        values = {"date_string": "26 Jul 2024"}
    elif name == "harmony":
        values = {"strftime_now": lambda form: {"%Y-%m-%d": "2024-07-26"}[form]}
    expected = transformers_ids(folder, CHATS[chat], tools, **values)
    assert list(Tokenizer.load(folder).chat(CHATS[chat], tools=tools or ())) == expected


@pytest.mark.parametrize("name", ["llama3.1", "llama3.2"])
def test_a_date_that_was_asked_for_is_transformers_with_that_date(name: str, tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, TEMPLATES[name])
    tokenizer = Tokenizer.load(folder, "2025-01-31")
    assert "Today Date: 31 Jan 2025\n" in text(tokenizer, [USER])
    assert list(tokenizer.chat([USER])) == transformers_ids(folder, [USER], None, date_string="31 Jan 2025")


def test_a_text_is_one_user_message_and_a_system_text_goes_before_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path, QWEN2_5))
    assert tokenizer.chat(USER["content"]) == tokenizer.chat([USER])
    assert tokenizer.chat(USER["content"], "Be brief.") == tokenizer.chat([SYSTEM, USER])
    assert text(tokenizer, "hi") == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text(tokenizer, "hi", "S").startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n")


def test_a_chat_that_opens_with_a_system_message_keeps_its_own(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path, QWEN2_5))
    assert tokenizer.chat([SYSTEM, USER], "Another.") == tokenizer.chat([SYSTEM, USER])


@pytest.mark.parametrize(
    "settings",
    [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}, {"tokenizer_class": "Llama"}],
    ids=str,
)
def test_plain_text_has_the_token_ids_of_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, adds_bos=True, **settings)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for words in ("", "né 日 12", "a <|im_start|>user\n b </s>"):
        for special in (True, False):
            ids = theirs.encode(words, add_special_tokens=special)
            assert list(ours.encode(words, special)) == ids
            assert ours.decode(ids, special) == theirs.decode(ids, skip_special_tokens=special)


# tokenizer_class and model_type of published checkpoints with byte-level tokens, and whether the class puts BOS itself.
NAMED_CLASSES = [
    ("LlamaTokenizerFast", "qwen2", True),  # DeepSeek-R1-Distill-Qwen-7B
    ("LlamaTokenizerFast", "llama", True),  # DeepSeek-R1-Distill-Llama-8B
    ("LlamaTokenizerFast", "deepseek_v3", True),  # DeepSeek-R1
    ("GPT2Tokenizer", "llama", False),  # SmolLM2-135M-Instruct
    ("PreTrainedTokenizerFast", "llama", False),  # Llama-3.1-8B-Instruct
    ("Qwen2Tokenizer", "qwen3", False),  # Qwen3-8B
    ("Qwen2Tokenizer", "mimo", False),  # MiMo-7B-RL
]


@pytest.mark.parametrize(("named", "model_type", "puts_bos"), NAMED_CLASSES)
def test_text_has_the_ids_of_tokenizer_json_whatever_class_the_config_names(
    named: str, model_type: str, puts_bos: bool, tmp_path: Path
) -> None:
    """transformers 5 gives its classes pre-tokenizers of their own: ids that the model was not trained on."""
    folder = save_tokenizer(tmp_path, QWEN2_5, tokenizer_class=named, add_bos_token=puts_bos)
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, stored["pre_tokenizer"]],
    }
    pairs = [(" ", "a"), ("1", "2"), ("n", "o")]
    for left, right in ((left.replace(" ", "Ġ"), right) for left, right in pairs):
        stored["model"]["vocab"][left + right] = len(stored["model"]["vocab"])
        stored["model"]["merges"].append([left, right])
    path.write_text(json.dumps(stored))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    raw, ours = RawTokenizer.from_file(str(path)), Tokenizer.load(folder)
    for words in ("no  a 12 né", "<|im_start|>user\n no a", "12 a\n\n no"):
        ids = raw.encode(words, add_special_tokens=False).ids
        assert list(ours.encode(words, special=False)) == ids
        assert list(ours.encode(words)) == [0] * puts_bos + ids
        assert ours.decode(ids, skip_special=False) == words


def test_the_chat_template_adds_no_second_bos_but_plain_text_gets_the_tokenizers_own(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path, LLAMA3_2, adds_bos=True))
    assert tokenizer.chat("hi").count(0) == 1
    assert tokenizer.encode("hi") == (0, *tokenizer.encode("hi", special=False))


def test_a_truncation_that_was_saved_with_the_tokenizer_cuts_no_text(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path, QWEN2_5) / "tokenizer.json"
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation": truncation}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("longer than four")) == "longer than four"
    assert "longer than four" in text(tokenizer, "longer than four")


def test_decoding_skips_special_tokens_unless_told_otherwise(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path))
    ids = (*tokenizer.encode("né 日"), tokenizer.eos_token_id or 0)
    assert tokenizer.decode(ids) == "né 日"
    assert tokenizer.decode(ids, skip_special=False) == "né 日</s>"


def test_a_tokenizer_without_a_template_refuses_to_chat_and_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--no-apply-chat-template"):
        Tokenizer.load(save_tokenizer(tmp_path)).chat("hi")


def test_a_template_in_a_file_of_its_own_counts_more_than_the_one_in_the_config(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, QWEN2_5)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert text(Tokenizer.load(folder), "hi") == "hi!"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (save_tokenizer(tmp_path) / name).unlink()
    with pytest.raises(CheckpointError, match=f"must hold a {name}"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    path = save_tokenizer(tmp_path) / name
    path.write_text(path.read_text()[:60])
    with pytest.raises(CheckpointError, match=name):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("where", ["vocabulary", "added token"])
def test_an_id_far_beyond_the_number_of_tokens_is_refused_before_anything_lists_what_is_left_out(
    where: str, tmp_path: Path
) -> None:
    """Two billion ids were listed in a warning of 24 GB."""
    path = save_tokenizer(tmp_path) / "tokenizer.json"
    stored = json.loads(path.read_text())
    if where == "vocabulary":
        stored["model"]["vocab"]["a"] = 2**31
    else:
        stored["added_tokens"][-1]["id"] = 2**31
    path.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=r"tokenizer.json: must have ids up to \d+ for its \d+ tokens.*2147483648"):
        Tokenizer.load(tmp_path)


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]})
    (tmp_path / "own.py").write_text("raise SystemExit('code of the checkpoint was run')")
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        ("{% for m in messages %}", "chat template must be valid Jinja"),
        ("{{ raise_exception('No users') }}", "must render a user's message: No users"),
        ("{{ messages[0].content + 1 }}", "must render a user's message"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute '__class__'"),
    ],
)
def test_a_chat_template_that_cannot_work_is_refused_when_it_is_loaded(
    tmp_path: Path, template: str, rule: str
) -> None:
    with pytest.raises(CheckpointError, match=rule):
        Tokenizer.load(save_tokenizer(tmp_path, template))


def test_a_chat_that_the_template_refuses_is_an_error_in_its_words(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path, LLAMA3_2))
    with pytest.raises(CheckpointError, match="must render these messages: Unknown role"):
        tokenizer.chat([{"role": "judge", "content": "no"}])


def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings_is_refused(tmp_path: Path, tiny_gguf: Path) -> None:
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path))
    config, size = GgufModel(tiny_gguf).config(), 256 + len(SPECIALS)
    check_vocabulary(tokenizer, ModelSpec.from_dict({**config, "vocab_size": size}))
    with pytest.raises(ConfigError, match=f"{size} ids"):
        check_vocabulary(tokenizer, ModelSpec.from_dict({**config, "vocab_size": size - 1}))
