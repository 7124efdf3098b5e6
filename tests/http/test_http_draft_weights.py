"""Draft weights over HTTP: an EAGLE-3 draft of its own folder, and an MTP layer inside the target's checkpoint."""

import base64
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from slime_spec.config.tree import SpeculativeConfig
from tests.support.embedded_harness import engine_config
from tests.support.http_server import Served, served
from tests.support.tiny_drafts import EAGLE3, make_tiny_draft, make_tiny_mimo
from tests.support.tiny_policy import make_tiny_policy

VOCAB = 257  # of the tiny policy
GREEDY = {"temperature": 0, "max_new_tokens": 30, "ignore_eos": True}
CONFIG = {**EAGLE3, "vocab_size": VOCAB}


def checksums(server: Served, selector: str) -> dict[str, str]:
    found: dict[str, str] = server.post("/weights_checker", {"selector": selector})[1]["ranks"][0]["checksums"]
    return found


def tokens(server: Served) -> list[int]:
    answer: dict[str, Any] = server.generate(text="abcabc", sampling_params=GREEDY)
    return list(answer["output_ids"])


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("drafted") / "policy")


@pytest.fixture
def eagle3(target: Path, tmp_path: Path) -> Iterator[Served]:
    draft = make_tiny_draft(tmp_path / "draft", target, CONFIG)
    speculative = SpeculativeConfig(algorithm="EAGLE3", draft_model_path=str(draft), num_steps=3, eagle_topk=1)
    with served(replace(engine_config(target), speculative=speculative)) as running:
        yield running


def test_another_draft_of_the_same_kind_replaces_the_weights_and_not_the_tokens(
    eagle3: Served, target: Path, tmp_path: Path
) -> None:
    before, own, policy = tokens(eagle3), checksums(eagle3, "draft"), checksums(eagle3, "target")
    other = make_tiny_draft(tmp_path / "other", target, CONFIG, seed=1)
    body = {"model_path": str(other), "selector": "draft"}
    assert eagle3.post("/update_weights_from_disk", body)[0] == 200
    assert tokens(eagle3) == before
    after = checksums(eagle3, "draft")
    assert after.keys() == own.keys()
    assert all(after[name] != own[name] for name in own)
    assert checksums(eagle3, "target") == policy
    assert eagle3.state()["draft_version"] == 1
    first = load_file(tmp_path / "draft" / "model.safetensors")
    trained = {name: tensor for name, tensor in first.items() if name not in ("d2t", "t2d")}
    part = {"serialized_named_tensors": [base64.b64encode(save(trained)).decode()], "load_format": "safetensors"}
    eagle3.post("/begin_weight_update", {"selector": "draft"})
    assert eagle3.post("/update_weights_from_tensor", part)[0] == 200
    assert eagle3.post("/end_weight_update")[0] == 200
    assert checksums(eagle3, "draft") == own


def test_a_draft_of_another_kind_or_vocabulary_is_refused(eagle3: Served, target: Path, tmp_path: Path) -> None:
    own = checksums(eagle3, "draft")

    def refused(folder: Path) -> str:
        status, answer = eagle3.post("/update_weights_from_disk", {"model_path": str(folder), "selector": "draft"})
        assert status == 400
        return str(answer["message"])

    biased = make_tiny_draft(tmp_path / "biased", target, {**CONFIG, "bias": True})
    assert "fc_bias" in refused(biased)
    recut = make_tiny_draft(tmp_path / "recut", target, CONFIG)
    stored = load_file(recut / "model.safetensors")
    ids = torch.arange(1, 2 * CONFIG["draft_vocab_size"], 2)
    stored["d2t"] = ids - torch.arange(len(ids))
    stored["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, ids, True)
    save_file(stored, recut / "model.safetensors", metadata={"format": "pt"})
    assert "d2t" in refused(recut)
    assert refused(target)
    assert checksums(eagle3, "draft") == own


def test_a_targets_payload_may_hold_its_mtp_layer_and_all_takes_both(target: Path, tmp_path: Path) -> None:
    def mimo(name: str, seed: int) -> Path:
        folder = make_tiny_mimo(tmp_path / name, vocab_size=VOCAB)
        for each in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(target / each, folder / each)
        generator = torch.Generator().manual_seed(seed)
        stored = load_file(folder / "model.safetensors")
        moved = {
            key: value + 0.05 * seed * torch.randn(value.shape, generator=generator) for key, value in stored.items()
        }
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    first, second = mimo("first", 0), mimo("second", 1)
    speculative = SpeculativeConfig(algorithm="NEXTN", num_steps=1, eagle_topk=1)
    with served(replace(engine_config(first), speculative=speculative)) as server:
        policy, own = checksums(server, "target"), checksums(server, "draft")
        payload = base64.b64encode(save(load_file(second / "model.safetensors"))).decode()
        body = {"serialized_named_tensors": [payload], "load_format": "safetensors"}
        server.post("/begin_weight_update", {"selector": "target"})
        assert server.post("/update_weights_from_tensor", body)[0] == 200
        assert server.post("/end_weight_update")[0] == 200
        assert checksums(server, "draft") == own
        moved = checksums(server, "target")
        assert all(moved[name] != policy[name] for name in policy)
        before = tokens(server)
        both = {"model_path": str(second), "selector": "all"}
        assert server.post("/update_weights_from_disk", both)[0] == 200
        assert checksums(server, "target") == moved
        after = checksums(server, "draft")
        assert all(after[name] != own[name] for name in own)
        assert tokens(server) == before
