"""vLLM on the CPU, in one process so that its CPU time can be counted; run by worker.py in vLLM's own Python."""

from __future__ import annotations

import os
from typing import Any

# Read by vLLM when it is imported: one process, the caller's choice of threads, a small KV cache.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="WARNING",
)


class VllmDriver:
    """Greedy generation; compiled unless ``eager``; ``speculative`` is vLLM's speculative_config or null."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import vllm

        self._sampling = vllm.SamplingParams
        self._speculates = settings.get("speculative") is not None
        self._llm = vllm.LLM(
            settings["model"],
            dtype=settings["dtype"],
            max_model_len=settings["max_tokens"],
            max_num_seqs=settings["max_batch"],
            enforce_eager=settings.get("eager", False),
            speculative_config=settings.get("speculative"),
            enable_prefix_caching=False,  # every round asks for the same prompts again
            disable_log_stats=not self._speculates,  # its counters of drafts are statistics too
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
        before = self._num_accepted()
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        replies = [list(each.outputs[0].token_ids) for each in outputs]
        # Every pass after the prefill yields one token and the drafts that were accepted.
        return replies, sum(len(each) - 1 for each in replies) - (self._num_accepted() - before)

    def _num_accepted(self) -> int:
        """Drafted tokens that were accepted so far, over all sequences."""
        if not self._speculates:
            return 0
        counters = [each for each in self._llm.get_metrics() if each.name == "vllm:spec_decode_num_accepted_tokens"]
        return sum(int(each.value) for each in counters)


def load(settings: dict[str, Any]) -> VllmDriver:
    return VllmDriver(settings)
