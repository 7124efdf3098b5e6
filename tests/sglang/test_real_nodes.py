"""The real SGLang as one engine on two nodes, both of them this machine: a tensor-parallel rank on each."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.nodes import NodeProcess
from slime_spec.site import Site
from tests.sglang.test_real_sglang import LOGPROB_ERROR, greedy
from tests.support.pushes import DirectTransport
from tests.support.sglang_real import Models, Real, cpu_environment, generate

NUM_TOKENS = 24


@pytest.mark.long
@pytest.mark.proves("rollout.sglang_engine")
@pytest.mark.sglang_server
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="SGLang binds each rank to a core of its own")
def test_an_engine_on_two_nodes_decodes_like_one_and_takes_pushes_on_both(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = models.config("EAGLE3", tmp_path, transport="distributed")
    config = replace(config, sglang={**config.sglang, "tp_size": 2})
    with cpu_environment():
        monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
        engine = SglangEngine(config, 0, DirectTransport(), Site(others=(NodeProcess("127.0.0.1", {}),)))
        try:
            engine.start()
            assert engine.server.info.num_ranks == 2
            two = Real("EAGLE3", engine)
            for sample, (token_ids, logprobs) in zip(
                generate(engine, NUM_TOKENS), greedy(models.target, NUM_TOKENS), strict=True
            ):
                assert sample.token_ids == token_ids
                assert sample.logprobs == pytest.approx(logprobs, abs=LOGPROB_ERROR)
                assert sample.spec.num_rounds > 0
            before = {side: two.checksums(side) for side in ("target", "draft")}
            two.push(two.other_target(), 1)
            after = two.checksums("target")
            # Every rank has changed what it holds of the target, and neither its draft's own weights.
            for rank in ("0:", "1:"):
                changed = [name for name in after if name.startswith(rank) and after[name] != before["target"][name]]
                assert len(changed) > 10
            own = [name for name in before["draft"] if "embed_tokens" not in name]
            draft = two.checksums("draft")
            assert {name: draft[name] for name in own} == {name: before["draft"][name] for name in own}
            assert {sample.weight_version for sample in generate(engine, NUM_TOKENS)} == {1}
            two.push(two.target_weights, 2)
            again = [sample.token_ids for sample in generate(engine, NUM_TOKENS)]
            assert again == [token_ids for token_ids, _ in greedy(models.target, NUM_TOKENS)]
        finally:
            engine.stop()
