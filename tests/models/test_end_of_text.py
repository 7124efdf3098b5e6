"""What ends a reply is the union of three files (case reports/02), and how a template closes a turn is seen from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from slime_spec.checkpoints.end_of_text import ReplyEnds, TurnEnd, end_token_ids, turn_end
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config, ModelConfig
from slime_spec.errors import CheckpointError
from slime_spec.preflight.finding import Severity
from slime_spec.preflight.gate import examine
from slime_spec.preflight.gather import gather
from tests.support.chat_templates import GLM4, LLAMA3_1, MISTRAL, QWEN2_5, SPECIALS, TEMPLATES, save_tokenizer
from tests.support.doctor_facts import TARGET

ID = {token: index for index, token in enumerate(SPECIALS)}
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"


def checkpoint(folder: Path, config: Any = ..., generation: Any = ..., **tokenizer: Any) -> Path:
    """A folder whose three files name these ends; ``...`` names none."""
    save_tokenizer(folder, **tokenizer)
    named = {} if config is ... else {"eos_token_id": config}
    (folder / "config.json").write_text(json.dumps({**TARGET, "vocab_size": 400, **named}))
    if generation is not ...:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "ends"),
    [
        (0, 0, {"eos_token": "<|im_end|>"}, {0, ID["<|im_end|>"]}),
        (5, [6, 7], {"eos_token": "</s>"}, {5, 6, 7, ID["</s>"]}),
        ([5], ..., {"eos_token": {"content": "<|eot_id|>", "__type": "AddedToken"}}, {5, ID["<|eot_id|>"]}),
        (None, None, {"eos_token": None}, set()),
        (..., ..., {"eos_token": None}, set()),
        (..., 0, {"eos_token": None}, {0}),
    ],
)
def test_the_union_of_three_files_ends_a_reply(
    config: Any, generation: Any, tokenizer: dict[str, Any], ends: set[int], tmp_path: Path
) -> None:
    """As in case reports/02, where the tokenizer alone names the token with which the template closes a turn."""
    folder = checkpoint(tmp_path, config, generation, **tokenizer)
    assert end_token_ids(folder) == ends
    assert end_token_ids(folder, Tokenizer.load(folder)) == ends


def test_a_turn_final_token_that_sglang_knows_by_its_text_ends_a_reply_too(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 0, added_tokens_decoder={"300": {"content": "<|eom_id|>", "special": True}})
    eom = AutoTokenizer.from_pretrained(folder).get_added_vocab()["<|eom_id|>"]
    assert end_token_ids(folder) == {0, ID["</s>"], eom}


def test_a_folder_without_a_tokenizer_ends_replies_at_what_its_configs_name(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3, [4])
    (folder / "tokenizer.json").unlink()
    assert end_token_ids(folder) == {3, 4}
    assert ReplyEnds.read(str(folder)) is None


@pytest.mark.parametrize("named", [True, 2.0, "2", -1, 400, [2, None], [[2]], {"id": 2}, float("nan"), 10**400])
@pytest.mark.parametrize("place", ["config", "generation"])
def test_what_is_no_token_of_the_model_is_refused_with_the_file(named: object, place: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, **{place: named})
    with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id: must be a token id") as refused:
        end_token_ids(folder)
    assert ("generation_config" in refused.value.setting) == (place == "generation")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN2_5, ("<|im_end|>\n", ["<|im_end|>"], True)),
        (LLAMA3_1, ("<|eot_id|>", ["<|eot_id|>"], True)),
        (MISTRAL, ("</s>", ["</s>"], True)),
        # GLM-4 writes nothing behind a reply: the next turn's opening ends it, and is what its EOS list holds.
        (GLM4, ("<|user|>\n", ["<|user|>"], False)),
        (PLAIN, ("\n\nuser: ", [], False)),
        # The last turn and an earlier one are closed differently (gpt-oss): the last one is what a reply is.
        ("{% for m in messages %}{{ m.content + ('</s>' if loop.last else '<|im_end|>') }}{% endfor %}",
         ("</s>", ["</s>"], True)),
        ("{{ messages[0].content }}", None),
        ("{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}", None),
        (None, None),
    ],
)  # fmt: skip
def test_how_a_template_closes_a_turn_is_seen_in_a_rendered_conversation(
    template: str | None, expected: tuple[str, list[str], bool] | None, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path, template))
    found = turn_end(tokenizer)
    if expected is None:
        assert found is None
    else:
        text, special, is_closed = expected
        ids = tokenizer.encode(text, special=False)
        assert found == TurnEnd(text, ids, {ID[each]: each for each in special}, is_closed)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_end_is_found_for_every_family(name: str, tmp_path: Path) -> None:
    assert turn_end(Tokenizer.load(save_tokenizer(tmp_path, TEMPLATES[name]))) is not None


@pytest.mark.parametrize(
    ("eos", "template", "severity"),
    [
        ("<|im_end|>", QWEN2_5, None),
        ("</s>", QWEN2_5, Severity.ERROR),
        ("</s>", MISTRAL, None),
        ("</s>", PLAIN, Severity.INFO),
        ("<|user|>", GLM4, None),
        (None, QWEN2_5, Severity.ERROR),
    ],
)
def test_the_doctor_compares_the_ends_with_the_template(
    eos: str | None, template: str, severity: Severity | None, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, eos_token=eos, template=template)
    facts = gather(Config(model=ModelConfig(hf_checkpoint=str(folder))), frozenset())
    found = [each.severity for each in examine(facts) if each.id == "end-of-text"]
    assert found == ([] if severity is None else [severity])
