"""The face of a real model: chat prompts, its EOS, text that streams."""

import json
from pathlib import Path

import pytest

from slime_spec.checkpoints.tokenizer import Tokenizer
from tests.support.embedded_harness import engine_config
from tests.support.http_server import served

REAL_MODEL = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
CONFIGS = ("config.json", "generation_config.json")


@pytest.mark.real_model
def test_a_real_model_streams_the_answer_it_gives_at_once_and_ends_it_with_its_eos(tmp_path: Path) -> None:
    """The tokenizer alone names its EOS here, as in case reports/02."""
    for path in REAL_MODEL.iterdir():
        named = {**json.loads(path.read_text()), "eos_token_id": 0} if path.name in CONFIGS else None
        (tmp_path / path.name).symlink_to(path) if named is None else (tmp_path / path.name).write_text(
            json.dumps(named)
        )
    tokenizer = Tokenizer.load(REAL_MODEL)
    question = tokenizer.chat("What is the capital of France? Answer in one sentence.")
    body = {"input_ids": list(question), "sampling_params": {"temperature": 0, "max_new_tokens": 60}}
    with served(engine_config(tmp_path, "LOOKUP", dtype="bfloat16"), incremental_streaming=True) as server:
        whole = server.generate(**body)
        assert "Paris" in whole["text"]
        assert whole["meta_info"]["finish_reason"] == {"type": "stop", "matched": tokenizer.eos_token_id}
        assert whole["output_ids"][-1] == tokenizer.eos_token_id
        assert "<|im_end|>" not in whole["text"]
        chunks = server.stream(**body)
        assert len(chunks) > 3
        assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
        kept = server.generate(
            input_ids=list(question),
            sampling_params={**body["sampling_params"], "skip_special_tokens": False, "no_stop_trim": True},
        )
        assert kept["text"] == whole["text"] + "<|im_end|>"
