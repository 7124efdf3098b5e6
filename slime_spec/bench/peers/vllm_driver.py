"""The driver runs vLLM on the CPU in one process, whose CPU time can be counted; worker.py runs it in vLLM's Python."""

from __future__ import annotations

import os
from typing import Any

# vLLM reads these at its import: one process, the caller's choice of threads, a small KV cache.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="WARNING",
)


# Methods that draft in every round. Others (n-grams) do not, and vLLM counts neither their rounds nor, in any method,
# which accepted drafts lay beyond a reply's end: their passes cannot be counted.
DRAFTS_ALWAYS = ("eagle", "eagle3", "mtp", "draft_model")


class VllmDriver:
    """Generates greedily; compiled unless ``eager``; ``speculative`` is vLLM's speculative_config or null."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import vllm

        self._sampling = vllm.SamplingParams
        speculative = settings.get("speculative")
        self._method = None if speculative is None else speculative["method"]
        self._llm = vllm.LLM(
            settings["model"],
            dtype=settings["dtype"],
            max_model_len=settings["max_tokens"],
            max_num_seqs=settings["max_batch"],
            enforce_eager=settings.get("eager", False),
            speculative_config=speculative,
            enable_prefix_caching=False,  # every round asks for the same prompts again
            disable_log_stats=self._method is None,  # its counters of drafts are statistics too
            seed=0,
        )
        self.about = {"engine": "vllm", "version": vllm.__version__}

    def generate(
        self, prompts: list[list[int]], num_new_tokens: int, stop_token_ids: list[int]
    ) -> tuple[list[list[int]], int | None]:
        params = self._sampling(
            temperature=0.0,
            max_tokens=num_new_tokens,
            stop_token_ids=stop_token_ids,
            ignore_eos=True,
            detokenize=False,
        )
        before = self._num_drafts()
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        replies = [list(each.outputs[0].token_ids) for each in outputs]
        return replies, num_passes(self._method, replies, self._num_drafts() - before)

    def _num_drafts(self) -> int:
        """Return the drafts verified so far, over all sequences: with DRAFTS_ALWAYS the passes after the prefills."""
        if self._method is None:
            return 0
        return sum(int(each.value) for each in self._llm.get_metrics() if each.name == "vllm:spec_decode_num_drafts")


def num_passes(method: str | None, replies: list[list[int]], num_drafts: int) -> int | None:
    """Return target passes after the prefills, None if vLLM does not count; ``num_drafts`` were verified meanwhile."""
    if method is None:
        return sum(len(each) - 1 for each in replies)
    return num_drafts if method in DRAFTS_ALWAYS else None


def load(settings: dict[str, Any]) -> VllmDriver:
    return VllmDriver(settings)
