"""Peers as processes, their installation, and the rows that come of them; the peers here are fakes."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slime_spec.bench.against_peers import (
    PeerCells,
    fastest,
    in_domain_rows,
    peer_processes,
    plain_rows,
    takes_part,
)
from slime_spec.bench.peers import catalogue
from slime_spec.bench.peers.catalogue import PEERS, STAMP, Mode, Peer, PeerFiles, PeerSizes, modes
from slime_spec.bench.peers.gguf_file import gguf_name, write_gguf
from slime_spec.bench.peers.install import install
from slime_spec.bench.peers.process import PeerProcess
from slime_spec.bench.peers.vllm_driver import num_passes
from slime_spec.bench.race import Answer, Ask, race, speed_up, tokens_per_pass
from slime_spec.bench.rows import Row
from slime_spec.bench.timing import Timed
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import load_tensors
from slime_spec.errors import ConfigError
from tests.support.tiny_models import make_tiny_checkpoint

DRIVER = Path(__file__).with_name("fake_driver.py")
PROMPTS = ((1, 2, 3), (40,), (7, 8))


def peer(folder: Path, **settings: Any) -> PeerProcess:
    return PeerProcess(Path(sys.executable), DRIVER, settings, folder / "fake.log", threads=3)


def test_a_peer_answers_prompts_in_order_batch_by_batch_whatever_it_prints(tmp_path: Path) -> None:
    with peer(tmp_path) as fake:
        fake.wait_ready()
        assert fake.about == {"engine": "fake", "threads": "3", "pythonpath": None}
        answer = fake.answer(Ask(PROMPTS, batch_size=2, num_new_tokens=4))
        assert answer.token_ids == [(4, 5, 6, 7), (41, 42, 43, 44), (9, 10, 11, 12)]
        assert answer.num_passes == 12
        stopped = fake.answer(Ask(PROMPTS, batch_size=3, num_new_tokens=4, stop_token_ids=(42,)))
        assert stopped.token_ids == [(4, 5, 6, 7), (41, 42), (9, 10, 11, 12)]
        assert fake.memory_bytes > 1_000_000
    assert "engines print" in (tmp_path / "fake.log").read_text()


def test_a_peers_cpu_time_is_its_own(tmp_path: Path) -> None:
    with peer(tmp_path, busy_s=0.3) as fake:
        fake.wait_ready()
        times = race("test", 1, {"fake": fake}, lambda turn: Ask(PROMPTS, 3, 2))
    assert 0.25 < times["fake"][0].cpu_s < 1.0


def test_a_peer_that_cannot_load_says_why(tmp_path: Path) -> None:
    with peer(tmp_path, die_at_load=True) as fake, pytest.raises(RuntimeError, match=r"code 1(.|\n)*no such model"):
        fake.wait_ready()


def test_a_peer_that_dies_over_a_request_says_why(tmp_path: Path) -> None:
    with peer(tmp_path, die_when_asked=True) as fake:
        fake.wait_ready()
        with pytest.raises(RuntimeError, match=r"fake ended with code 1(.|\n)*out of memory"):
            fake.answer(Ask(PROMPTS, 3, 4))


def test_a_peer_that_answers_with_fewer_tokens_than_asked_is_not_measured(tmp_path: Path) -> None:
    with peer(tmp_path, tokens_short=1) as fake:
        fake.wait_ready()
        with pytest.raises(AssertionError, match="after 3 of 4 tokens"):
            fake.answer(Ask(PROMPTS, 3, 4))


def test_passes_that_a_peer_does_not_know_are_not_made_up(tmp_path: Path) -> None:
    with peer(tmp_path, passes=None) as fake:
        fake.wait_ready()
        answer = fake.answer(Ask(PROMPTS, 1, 4))
    assert answer.num_passes is None
    assert tokens_per_pass([Timed(1.0, answer)]) is None


@pytest.mark.parametrize(("method", "expected"), [(None, 2 + 4), ("eagle3", 3), ("ngram", None)])
def test_vllms_passes_are_its_drafts_where_every_round_has_one(method: str | None, expected: int | None) -> None:
    """Not tokens less accepted drafts: those beyond a reply's end are accepted too, and no token of the reply."""
    replies = [[1, 2, 3], [1, 2, 3, 4, 5]]
    assert num_passes(method, replies, num_drafts=3) == expected


class InstantSide:
    """A side of this process with a speed of its choice."""

    def __init__(self, cpu_s_per_token: float) -> None:
        self._step, self._used = cpu_s_per_token, 0.0

    def answer(self, ask: Ask) -> Answer:
        tokens = [tuple(range(ask.num_new_tokens)) for _ in ask.prompts]
        self._used += self._step * sum(map(len, tokens))
        return Answer(tokens, sum(map(len, tokens)))

    def cpu_s(self) -> float:
        return self._used


def by_id(rows: Sequence[Row]) -> dict[str, Row]:
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: row for row in rows}


def test_plain_decoding_is_held_against_the_faster_peer_at_batch_1_and_vllm_at_batch_8() -> None:
    speeds = {"plain": 1.0, "hf": 4.0, "vllm.plain": 1.5, "llama_cpp.plain": 0.5, "llama_cpp.lookup3": 0.1}
    sides = {name: InstantSide(step) for name, step in speeds.items()}
    cells = PeerCells(num_new_tokens=4, num_rounds=2)
    rows = by_id(
        [row for batch_size in cells.batch_sizes for row in plain_rows("chat", PROMPTS, batch_size, sides, cells)]
    )
    at_1 = rows["peers.chat.b1.plain_vs_faster.cpu_ratio"]
    assert (at_1.value, at_1.reach, at_1.holds) == (pytest.approx(0.5), ">= 0.9", False)
    assert "llama_cpp.plain" in at_1.what
    at_8 = rows["peers.chat.b8.plain_vs_vllm.cpu_ratio"]
    assert (at_8.value, at_8.reach, at_8.holds) == (pytest.approx(1.5), ">= 1", True)
    assert rows["peers.chat.b8.plain_vs_llama_cpp.cpu_ratio"].holds is None
    assert rows["peers.chat.b8.hf.tokens_per_cpu_s"].value == pytest.approx(0.25)


def test_our_best_mode_is_held_against_the_best_mode_of_any_peer() -> None:
    speeds = {"plain": 1.0, "lookup3": 0.4, "eagle3_s3k1n4": 0.5, "vllm.plain": 0.9, "llama_cpp.lookup3": 0.6}
    sides = {name: InstantSide(step) for name, step in speeds.items()}
    rows = by_id(in_domain_rows(PROMPTS, (99,), sides, PeerCells(num_new_tokens=4, num_rounds=2)))
    for batch_size in (1, 8):
        row = rows[f"peers.in_domain.b{batch_size}.best_vs_best.cpu_ratio"]
        assert (row.value, row.reach, row.holds) == (pytest.approx(1.5), ">= 1.3", True)
        assert "lookup3, over" in row.what
        assert "llama_cpp.lookup3" in row.what
        eagle3 = rows[f"peers.in_domain.b{batch_size}.eagle3_vs_best.cpu_ratio"]
        assert (eagle3.value, eagle3.holds) == (pytest.approx(1.2), None)


def test_without_peers_there_are_our_speeds_and_no_ratio() -> None:
    rows = plain_rows("chat", PROMPTS, 1, {"plain": InstantSide(1.0)}, PeerCells(4, 1))
    rows += in_domain_rows(PROMPTS, (99,), {"plain": InstantSide(1.0), "lookup3": InstantSide(1.0)}, PeerCells(4, 1))
    assert rows
    assert not [row for row in rows if "ratio" in row.id]


def test_lookup_takes_part_where_one_prompt_is_copied_and_eagle3_only_in_its_domain() -> None:
    names = (
        "plain",
        "lookup3",
        "eagle3_s3k1n4",
        "hf",
        "vllm.plain",
        "vllm.ngram3",
        "vllm.eagle3_3",
        "llama_cpp.lookup10",
    )
    assert [name for name in names if takes_part(name, looks_up=False)] == ["plain", "hf", "vllm.plain"]
    more = {"lookup3", "vllm.ngram3", "llama_cpp.lookup10"}
    assert {name for name in names if takes_part(name, looks_up=True)} == {"plain", "hf", "vllm.plain"} | more


def test_the_fastest_side_has_the_most_tokens_per_cpu_second() -> None:
    slow, fast = (Timed(1.0, Answer([(1, 2)]), cpu_s) for cpu_s in (2.0, 1.0))
    assert fastest({"a": [slow], "b": [fast]}, ["a", "b"]) == "b"
    assert speed_up([slow], [fast], "cpu_s") == 2.0


def a_peer(name: str = "fake") -> Peer:
    return Peer(name, "Fake", DRIVER, (("install", "thing==1"), ("uninstall", "-y", "other")), {"BUILD": "native"})


def test_an_installation_runs_its_steps_once_and_counts_only_when_it_is_whole(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def run(command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
        assert environment["BUILD"] == "native"
        calls.append([command[2], command[3], command[-1]] if command[2] == "pip" else [command[2]])
        (tmp_path / "fake").mkdir(exist_ok=True)
        return 0

    assert not a_peer().is_installed(tmp_path)
    install(a_peer(), tmp_path, run)
    assert calls == [["venv"], ["pip", "install", "thing==1"], ["pip", "uninstall", "other"]]
    assert a_peer().is_installed(tmp_path)
    install(a_peer(), tmp_path, run)
    assert len(calls) == 3
    newer = Peer("fake", "Fake", DRIVER, (("install", "thing==2"),))
    assert not newer.is_installed(tmp_path)


def test_an_installation_that_fails_is_an_error_with_its_log_and_no_stamp(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a step of Fake ended with code 7.*fake-install\.log"):
        install(a_peer(), tmp_path, lambda command, environment, log: 7)
    assert not (tmp_path / "fake" / STAMP).exists()


def test_only_installed_peers_are_started_with_as_many_threads_as_we_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake" / "bin").mkdir(parents=True)
    (tmp_path / "fake" / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setitem(catalogue.PEERS, "fake", a_peer())
    monkeypatch.setitem(catalogue.PEERS, "absent", a_peer("absent"))
    wanted = [Mode("fake.plain", "fake", "", {}), Mode("absent.plain", "absent", "", {})]
    with peer_processes(wanted, [a_peer()], tmp_path, tmp_path, threads=3) as processes:
        assert list(processes) == ["fake.plain"]
        assert processes["fake.plain"].about["threads"] == "3"
        assert processes["fake.plain"].answer(Ask(((1,),), 1, 2)).token_ids == [(2, 3)]


def test_every_mode_belongs_to_a_peer_and_begins_with_its_name(tmp_path: Path) -> None:
    files = PeerFiles(tmp_path, tmp_path / "model.gguf", 131, tmp_path / "draft")
    found = modes(files, PeerSizes())
    assert {mode.peer for mode in found} == PEERS.keys()
    assert all(mode.id.startswith(f"{mode.peer}.") for mode in found)
    assert [mode.id for mode in found if not mode.speculates] == ["vllm.plain", "llama_cpp.plain"]
    assert all(json.dumps(dict(mode.settings)) for mode in found)
    without_draft = {mode.id for mode in modes(PeerFiles(tmp_path, tmp_path, 131), PeerSizes())}
    assert {mode.id for mode in found} - without_draft == {"vllm.eagle3_3", "vllm.eagle3_7"}


def test_the_gguf_file_reads_back_as_the_checkpoint(tmp_path: Path) -> None:
    from slime_spec.checkpoints.gguf import halves_from_pairs

    gguf = pytest.importorskip("gguf")
    folder = make_tiny_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    spec = ModelSpec.from_folder(folder)
    write_gguf(folder, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    tensors = load_tensors(folder, spec)
    assert stored.keys() == {gguf_name(name) for name in tensors}
    heads = {"attn_q": spec.num_heads, "attn_k": spec.num_kv_heads}
    for name, tensor in tensors.items():
        values = stored[gguf_name(name)].astype(np.float32)
        part = gguf_name(name).split(".")[-2]
        if part in heads:
            values = halves_from_pairs(values, heads[part])
        expected = tensor if tensor.dim() == 1 else tensor.to(torch.bfloat16).float()
        assert torch.equal(torch.from_numpy(np.ascontiguousarray(values)), expected)
    assert reader.fields["llama.rope.freq_base"].contents() == spec.rope_theta
    assert math.isclose(
        reader.fields["llama.attention.layer_norm_rms_epsilon"].contents(), spec.rms_norm_eps, rel_tol=1e-6
    )


def test_a_model_that_llama_cpp_would_read_differently_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", "Qwen2ForCausalLM")
    with pytest.raises(ConfigError, match="LlamaForCausalLM with plain RoPE"):
        write_gguf(folder, tmp_path / "model.gguf")
