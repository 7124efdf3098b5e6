"""The driver runs llama.cpp by llama-cpp-python's low-level calls, in worker.py's Python, many sequences a pass.

The package's own ``Llama`` class decodes one sequence at a time; this loop adds as little as ctypes allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class LlamaCppDriver:
    """Generates greedily; with ``lookup`` > 0 the package's own prompt lookup proposes that many tokens."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import llama_cpp
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        self._api = llama_cpp
        self._num_vocab = settings["num_vocab"]
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            settings["gguf"].encode(), llama_cpp.llama_model_default_params()
        )
        assert self._model, f"llama.cpp could not load {settings['gguf']}"
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = settings["max_batch"]
        params.n_ctx = params.n_batch = settings["max_batch"] * settings["max_tokens"]
        params.n_threads = params.n_threads_batch = settings["threads"]
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp could not make a context"
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        lookup = settings.get("lookup", 0)
        self._draft: Callable[..., Any] | None = (
            LlamaPromptLookupDecoding(max_ngram_size=settings["ngram"], num_pred_tokens=lookup) if lookup else None
        )
        self.about = {"engine": "llama.cpp", "version": f"llama-cpp-python {llama_cpp.__version__}"}

    def generate(
        self, prompts: list[list[int]], num_new_tokens: int, stop_token_ids: list[int]
    ) -> tuple[list[list[int]], int]:
        self._api.llama_memory_clear(self._memory, False)
        sequences = [list(prompt) for prompt in prompts]
        ends = [len(prompt) + num_new_tokens for prompt in prompts]
        first = self._decode([(i, 0, prompt, 1) for i, prompt in enumerate(prompts)])
        for sequence, (token,) in zip(sequences, first, strict=True):
            sequence.append(token)
        num_passes = 0
        while live := [
            i for i, end in enumerate(ends) if len(sequences[i]) < end and sequences[i][-1] not in stop_token_ids
        ]:
            drafts = [self._drafted(sequences[i], ends[i] - len(sequences[i]) - 1) for i in live]
            spans = [
                (i, len(sequences[i]) - 1, [sequences[i][-1], *draft], 1 + len(draft))
                for i, draft in zip(live, drafts, strict=True)
            ]
            for i, draft, tokens in zip(live, drafts, self._decode(spans), strict=True):
                self._take(sequences[i], i, draft, tokens, stop_token_ids)
            num_passes += len(live)
        return [sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)], num_passes

    def _take(self, sequence: list[int], index: int, draft: list[int], tokens: list[int], stops: list[int]) -> None:
        """Append the tokens of a pass: the accepted drafts and the token after them, up to a stop token."""
        for position, token in enumerate(tokens):
            sequence.append(token)
            if token in stops or position == len(draft) or token != draft[position]:
                break
        if len(draft):
            self._api.llama_memory_seq_rm(self._memory, index, len(sequence) - 1, -1)

    def _drafted(self, sequence: list[int], limit: int) -> list[int]:
        if self._draft is None or limit <= 0:
            return []
        drafted: list[int] = self._draft(np.array(sequence, dtype=np.intc)).tolist()
        return drafted[:limit]

    def _decode(self, spans: Sequence[tuple[int, int, Sequence[int], int]]) -> list[list[int]]:
        """Run a pass over (sequence, first position, tokens, number of final logits); return their argmax."""
        batch, index = self._batch, 0
        for sequence, start, tokens, wanted in spans:
            for offset, token in enumerate(tokens):
                batch.token[index] = token
                batch.pos[index] = start + offset
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = offset >= len(tokens) - wanted
                index += 1
        batch.n_tokens = index
        status = self._api.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode returned {status}"
        total = sum(wanted for *_, wanted in spans)
        logits = np.ctypeslib.as_array(self._api.llama_get_logits(self._context), shape=(total * self._num_vocab,))
        chosen = logits.reshape(total, self._num_vocab).argmax(axis=1).tolist()
        replies = []
        for *_, wanted in spans:
            replies.append(chosen[:wanted])
            chosen = chosen[wanted:]
        return replies


def load(settings: dict[str, Any]) -> LlamaCppDriver:
    return LlamaCppDriver(settings)
