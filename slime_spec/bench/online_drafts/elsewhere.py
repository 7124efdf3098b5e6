"""Run the policy and the draft that a run exported in vLLM, which knows nothing of this project, and compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from slime_spec.bench.drafts import CHAINS, eagle3_config, vllm_draft_folder
from slime_spec.bench.local_engine import started_engine
from slime_spec.bench.online_drafts.arms import finished_arm
from slime_spec.bench.peers.catalogue import INSTALL, PEERS
from slime_spec.bench.peers.process import PeerProcess
from slime_spec.bench.prompts import in_domain
from slime_spec.bench.race import Answer, Ask, EngineSide
from slime_spec.bench.rows import BenchOptions, Row, at_least
from slime_spec.checkpoints.end_of_text import end_token_ids

DTYPE = "float32"  # in bfloat16 engines that sum in another order part at near-ties
NUM_PROMPTS, BATCH_SIZE, LONGEST = 32, 8, 40
SHAPE = next(shape for shape in CHAINS if shape.num_steps == 3)


def measure_elsewhere(options: BenchOptions) -> list[Row]:
    """Compare greedy replies and tokens per pass of vLLM and the embedded engine; one row where vLLM is absent."""
    peer, folder = PEERS["vllm"], options.peers.expanduser()
    if not peer.is_installed(folder):
        return [Row("drafts.elsewhere.vllm", f"{peer.title} is not installed: {INSTALL} and it is", math.nan, "")]
    arm = finished_arm("online", options)
    exported = replace(options, model=arm.folder / "hf", draft=str(arm.folder / "draft"))
    prompts = in_domain(exported.model, NUM_PROMPTS, options.seeds[0])
    ask = Ask(prompts, BATCH_SIZE, LONGEST, tuple(end_token_ids(exported.model)))
    with started_engine(eagle3_config(exported, DTYPE, SHAPE)) as engine:
        ours = EngineSide(engine, speculative=True).answer(ask)
    with TemporaryDirectory(prefix="slime-spec-vllm-") as scratch:
        theirs = _answer_of_vllm(exported, ask, peer.python(folder), peer.driver, Path(scratch))
    return rows_of(ours, theirs)


def _answer_of_vllm(exported: BenchOptions, ask: Ask, python: Path, driver: Path, scratch: Path) -> Answer:
    draft = vllm_draft_folder(exported, scratch / "draft")
    settings = {
        "model": str(exported.model),
        "dtype": DTYPE,
        "max_batch": BATCH_SIZE,
        "max_tokens": 512,
        "eager": True,
        "speculative": {"method": "eagle3", "model": str(draft), "num_speculative_tokens": SHAPE.num_steps},
    }
    with PeerProcess(python, driver, settings, scratch / "vllm.log", exported.threads or 1) as vllm:
        vllm.wait_ready()
        return vllm.answer(ask)


def rows_of(ours: Answer, theirs: Answer) -> list[Row]:
    """Compare two engines' replies to the same prompts."""
    num_same = sum(mine == other for mine, other in zip(ours.token_ids, theirs.token_ids, strict=True))
    mine, other = tokens_per_pass(ours.token_ids, ours.num_passes), tokens_per_pass(theirs.token_ids, theirs.num_passes)
    what = "tokens a pass behind the first token, greedy, the draft that learned"
    return [
        Row("drafts.elsewhere.same", f"replies that are the same, of {len(ours.token_ids)}", num_same, "replies"),
        Row("drafts.elsewhere.ours", f"{what}, the embedded engine", mine, "tokens/pass"),
        Row("drafts.elsewhere.vllm", f"{what}, vLLM", other, "tokens/pass"),
        at_least("drafts.elsewhere.vllm_over_ours", f"{what}, vLLM's over ours", other / mine, "x", 0.97),
    ]


def tokens_per_pass(replies: Sequence[Sequence[int]], num_passes: int | None) -> float:
    """Return what a pass after the prefill brought, which itself gives the first token."""
    assert num_passes, "both engines count their passes with a draft"
    return sum(len(reply) - 1 for reply in replies) / num_passes
