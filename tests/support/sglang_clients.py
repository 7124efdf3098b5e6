"""Run with SGLang's Python: its frontend language and its benchmark against the server of an address; prints JSON.

python sglang_clients.py URL FOLDER_OF_THE_TOKENIZER RESULTS_FOLDER
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import sglang as sgl
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint


@sgl.function
def chat(s: Any, question: str) -> None:
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=12, temperature=0, return_logprob=True, top_logprobs_num=2))


@sgl.function
def choose(s: Any) -> None:
    s += "the cat sat on the "
    s += sgl.select("choice", choices=["mat", "dog", "cat and the"])


def frontend(url: str) -> dict[str, Any]:
    """What SGLang's frontend language gets."""
    backend = RuntimeEndpoint(url)
    sgl.set_default_backend(backend)
    backend.flush_cache()
    backend.cache_prefix("the cat ")
    states = chat.run_batch([{"question": "abc"}, {"question": "日本"}], progress_bar=False)
    streamed = "".join(chat.run(question="abc", stream=True).text_iter("answer"))
    return {
        "model": backend.get_model_name(),
        "algorithm": backend.get_server_info()["speculative_algorithm"],
        "answers": [state["answer"] for state in states],
        "texts": [state.text() for state in states],
        "num_logprobs": len(states[0].get_meta_info("answer")["output_top_logprobs"]),
        "streamed": streamed,
        "choice": choose.run()["choice"],
    }


def benchmark(url: str, tokenizer: str, file: Path) -> dict[str, Any]:
    """What ``python -m sglang.bench_serving`` measures."""
    sys.argv = ["bench_serving", "--backend", "sglang", "--base-url", url, "--model", tokenizer]
    sys.argv += ["--tokenizer", tokenizer, "--dataset-name", "random-ids", "--num-prompts", "3", "--disable-tqdm"]
    sys.argv += ["--random-input-len", "8", "--random-output-len", "8", "--random-range-ratio", "1"]
    sys.argv += ["--output-file", str(file)]
    runpy.run_module("sglang.bench_serving", run_name="__main__", alter_sys=True)
    measured: dict[str, Any] = json.loads(file.read_text())
    return measured


if __name__ == "__main__":
    url, tokenizer, results = sys.argv[1:]
    found = {"frontend": frontend(url), "benchmark": benchmark(url, tokenizer, Path(results) / "benchmark.jsonl")}
    (Path(results) / "found.json").write_text(json.dumps(found))
