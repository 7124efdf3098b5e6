"""Hugging Face's model and its ``generate`` are the baseline engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import process_time

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from slime_spec.bench.local_engine import device_of
from slime_spec.bench.race import Answer, Ask


class HfGenerate:
    """Generates greedily with Hugging Face, exactly ``num_new_tokens`` a prompt, padded on the left.

    It runs on the CPU, or on the GPU where ``num_gpus`` is 1.
    """

    def __init__(self, model: Path, dtype: str, num_new_tokens: int, num_gpus: int = 0) -> None:
        self.num_new_tokens = num_new_tokens
        self._device = device_of(num_gpus)
        disable_progress_bar()  # its "Loading weights" bar would break this program's own bar
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model = loaded.to(self._device).eval()
        # generate() takes its defaults from this configuration; without an EOS id no reply ends early.
        self._model.generation_config = GenerationConfig(
            max_new_tokens=num_new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )

    def replies(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        longest = max(len(prompt) for prompt in prompts)
        padded = [(0,) * (longest - len(prompt)) + prompt for prompt in prompts]
        shown = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ids, mask = (torch.tensor(each, device=self._device) for each in (padded, shown))
        out = self._model.generate(ids, attention_mask=mask)[:, longest:]
        assert out.shape[1] == self.num_new_tokens, f"Hugging Face stopped after {out.shape[1]} tokens"
        return [tuple(reply) for reply in out.tolist()]

    @torch.inference_mode()
    def logits(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        """Return logits [tokens, vocab]"""
        return self._model(torch.tensor([token_ids], device=self._device)).logits[0].float()


class HfSide:
    """Implements Side with ``HfGenerate``; its replies never end early."""

    def __init__(self, reference: HfGenerate) -> None:
        self._reference = reference

    def answer(self, ask: Ask) -> Answer:
        assert not ask.stop_token_ids, "HfGenerate ends every reply by its length"
        assert ask.num_new_tokens == self._reference.num_new_tokens
        replies = [reply for batch in ask.batches for reply in self._reference.replies(batch)]
        return Answer(replies, len(replies) * (ask.num_new_tokens - 1))

    def cpu_s(self) -> float:
        return process_time()
