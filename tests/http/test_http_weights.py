"""Weight updates over HTTP: from a folder, as tensors in a session; target and draft apart; all or nothing."""

import base64
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from slime_spec.config.tree import Config, SpeculativeConfig
from tests.support.embedded_harness import engine_config
from tests.support.http_server import Served, served
from tests.support.tiny_policy import make_tiny_policy

GREEDY = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
Weights = dict[str, torch.Tensor]


def other_weights(folder: Path, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }


def checkpoint(folder: Path, like: Path, weights: Weights) -> Path:
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((like / name).read_text())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def payload(weights: Weights) -> dict[str, Any]:
    return {"serialized_named_tensors": [base64.b64encode(save(weights)).decode()], "load_format": "safetensors"}


def generated(server: Served) -> tuple[list[int], dict[str, Any]]:
    answer = server.generate(text="abcabc", sampling_params=GREEDY)
    return answer["output_ids"], answer["meta_info"]


def tokens_of(config: Config, folder: Path) -> list[int]:
    """What a server started on this folder generates."""
    with served(replace(config, model=replace(config.model, hf_checkpoint=str(folder)))) as fresh:
        return generated(fresh)[0]


@pytest.fixture(scope="module")
def small_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("weights") / "policy")


@pytest.fixture(scope="module")
def small_config(small_policy: Path) -> Config:
    return engine_config(small_policy, "LOOKUP")


@pytest.fixture
def target(small_config: Config) -> Iterator[Served]:
    with served(small_config) as running:
        yield running


def test_weights_from_a_folder_change_what_is_generated_and_the_version(
    target: Served, small_config: Config, small_policy: Path, tmp_path: Path
) -> None:
    weights = other_weights(small_policy, seed=1)
    folder = checkpoint(tmp_path / "next", small_policy, weights)
    before, info = generated(target)
    assert info["weight_version"] == "default"
    checksums = target.post("/weights_checker", {"action": "checksum"})[1]["ranks"][0]["checksums"]
    assert checksums.keys() == weights.keys()
    status, answer = target.post("/update_weights_from_disk", {"model_path": str(folder), "weight_version": "v1"})
    assert (status, answer["success"], answer["num_paused_requests"]) == (200, True, 0)
    after, info = generated(target)
    assert after == tokens_of(small_config, folder) != before
    assert info["weight_version"] == "v1"
    assert info["weight_versions"] == [{"version": "v1", "start": 0, "end": 40}]
    changed = target.get("/weights_checker")[1]["ranks"][0]["checksums"]
    assert all(changed[name] != checksums[name] for name in weights)
    assert target.get("/model_info")[1]["weight_version"] == "v1"
    target.post("/update_weights_from_disk", {"model_path": str(small_policy)})
    again, info = generated(target)
    assert again == before
    assert info["weight_version"] == "v1"  # as SGLang: an update without a version keeps the name
    status, answer = target.post("/update_weight_version", {"new_version": "v9"})
    assert (status, answer["new_version"]) == (200, "v9")
    assert generated(target)[1]["weight_version"] == "v9"


def test_tensors_are_used_at_the_end_of_their_session(
    target: Served, small_config: Config, small_policy: Path, tmp_path: Path
) -> None:
    weights = other_weights(small_policy, seed=2)
    expected = tokens_of(small_config, checkpoint(tmp_path / "next", small_policy, weights))
    before, _ = generated(target)
    assert target.post("/begin_weight_update", {"selector": "target"})[0] == 200
    names = sorted(weights)
    for part in (names[::2], names[1::2]):
        body = {**payload({name: weights[name] for name in part}), "weight_version": "v2", "selector": "target"}
        assert target.post("/update_weights_from_tensor", body)[0] == 200
        assert generated(target)[0] == before
    assert target.post("/end_weight_update") == (200, {"success": True, "message": "Success"})
    after, info = generated(target)
    assert (after, info["weight_version"]) == (expected, "v2")


def refused(server: Served, path: str, body: object = None) -> str:
    status, answer = server.post(path, body)
    assert status == 400, answer
    assert answer["success"] is False
    assert answer["message"] == answer["error"]["message"]
    return str(answer["message"])


def test_sessions_are_opened_once_and_a_stale_one_can_be_ended(target: Served, small_policy: Path) -> None:
    weights = load_file(small_policy / "model.safetensors")
    assert "between begin_weight_update" in refused(target, "/update_weights_from_tensor", payload(weights))
    assert "no weight-update session is open" in refused(target, "/end_weight_update")
    assert target.post("/begin_weight_update")[0] == 200
    assert "already open" in refused(target, "/begin_weight_update")
    before, _ = generated(target)
    assert target.post("/update_weights_from_tensor", payload({"model.norm.weight": weights["model.norm.weight"]}))
    assert "lacks" in refused(target, "/end_weight_update")  # incomplete: dropped as a whole
    assert generated(target)[0] == before
    assert target.post("/begin_weight_update")[0] == target.post("/end_weight_update")[0] == 200


REFUSED = {
    "int8": "is int8: weights must be one of float32",
    "bool": "is bool: weights",
    "uint16": "is uint16: weights",
    "complex64": "is complex64: weights",
    "float8_e4m3fn": "is float8_e4m3fn: weights",
    "float8_e5m2": "is float8_e5m2: weights",
    "infinity": r"\(float32\) holds NaN or infinity",
    "NaN": r"\(float32\) holds NaN or infinity",
    "overflow": r"\(float64\) holds 1e\+300, which is infinite in the engine's float32",
    "shape": "has shape",
    "empty": r"has shape \(0, 48\)",
    "name": "does not know: model.layers.9",
}


def damaged(weights: Weights, how: str) -> Weights:
    name = "model.layers.0.mlp.up_proj.weight"
    if how == "overflow":
        return {**weights, name: weights[name].double().index_fill(0, torch.tensor([3]), -1e300)}
    if how == "empty":
        return {**weights, name: weights[name][:0]}
    if how == "NaN":
        return {**weights, name: weights[name].index_fill(1, torch.tensor([2]), float("nan"))}
    if how in ("int8", "bool", "uint16", "complex64", "float8_e4m3fn", "float8_e5m2"):
        return {**weights, name: weights[name].abs().to(getattr(torch, how))}
    if how == "shape":
        return {**weights, name: weights[name][:-1]}
    if how == "name":
        return {**weights, "model.layers.9.mlp.up_proj.weight": weights[name].clone()}
    assert how == "infinity"
    return {**weights, name: weights[name].index_fill(0, torch.tensor([3]), float("inf"))}


@pytest.mark.parametrize("how", REFUSED)
def test_tensors_that_are_no_weights_of_this_model_change_nothing(target: Served, small_policy: Path, how: str) -> None:
    """Case audit/02: each of these was swapped in, or ended in a 500."""
    weights = damaged(other_weights(small_policy, seed=3), how)
    before, _ = generated(target)
    checksum = target.get("/weights_checker")[1]["per_engine_checksum"]
    target.post("/begin_weight_update")
    message = refused(target, "/update_weights_from_tensor", payload(weights))
    assert re.search(rf"mlp\.up_proj\.weight.*{REFUSED[how]}|{REFUSED[how]}.*mlp\.up_proj\.weight", message), message
    assert message in refused(target, "/end_weight_update")
    after, info = generated(target)
    assert (after, info["weight_version"]) == (before, "default")
    assert target.get("/weights_checker")[1]["per_engine_checksum"] == checksum


HEADER = b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
NO_SAFETENSORS = {
    "no base64": "!!!",
    "not ASCII": "\u00e9",
    "empty": "",
    "a header of 2**62 bytes": base64.b64encode((2**62).to_bytes(8, "little") + b"{}").decode(),
    "a header that is a list": base64.b64encode((2).to_bytes(8, "little") + b"[]").decode(),
    "a deep header": base64.b64encode((9000).to_bytes(8, "little") + b"[" * 9000).decode(),
    "an unknown dtype": base64.b64encode(len(HEADER).to_bytes(8, "little") + HEADER + b"0").decode(),
}


@pytest.mark.parametrize("how", [*NO_SAFETENSORS, "truncated"])
def test_a_payload_that_is_no_safetensors_file_is_refused_and_drops_its_session(
    target: Served, small_policy: Path, how: str
) -> None:
    """Case audit/02."""
    whole = payload(load_file(small_policy / "model.safetensors"))["serialized_named_tensors"][0]
    body = {"serialized_named_tensors": [NO_SAFETENSORS.get(how, whole[:400])], "load_format": "safetensors"}
    target.post("/begin_weight_update")
    message = refused(target, "/update_weights_from_tensor", body)
    assert "serialized_named_tensors: must" in message
    assert message in refused(target, "/end_weight_update")
    assert generated(target)[1]["weight_version"] == "default"


def test_a_tensor_that_comes_twice_in_a_session_is_refused(target: Served, small_policy: Path) -> None:
    weights = load_file(small_policy / "model.safetensors")
    target.post("/begin_weight_update")
    assert target.post("/update_weights_from_tensor", payload(weights))[0] == 200
    again = payload({"model.norm.weight": weights["model.norm.weight"]})
    assert "model.norm.weight came twice" in refused(target, "/update_weights_from_tensor", again)
    assert "came twice" in refused(target, "/end_weight_update")


@pytest.mark.parametrize("path", ["\0", "a" * 5000, "/" + "/".join(["a" * 200] * 15), "/dev", "relative"], ids=repr)
def test_a_path_that_is_no_folder_is_refused(target: Served, path: str) -> None:
    """Case audit/02: a path that is too long ended in a 500."""
    assert re.search("model_path|hf_checkpoint", refused(target, "/update_weights_from_disk", {"model_path": path}))


def test_pickled_tensors_and_process_groups_are_refused_with_what_to_do(target: Served) -> None:
    pickled = {"serialized_named_tensors": [base64.b64encode(b"\x80\x04.").decode()]}
    assert "never unpickles" in refused(target, "/update_weights_from_tensor", pickled)
    pretended = {**pickled, "load_format": "safetensors"}
    target.post("/begin_weight_update")
    assert "base64 of a safetensors file" in refused(target, "/update_weights_from_tensor", pretended)
    two = {"serialized_named_tensors": ["", ""], "load_format": "safetensors"}
    assert "one rank" in refused(target, "/update_weights_from_tensor", two)
    for path in ("/init_weights_update_group", "/update_weights_from_distributed", "/update_weights_from_ipc"):
        assert "update_weights_from_disk" in refused(target, path, {"names": []})


def test_folders_that_are_not_this_model_are_refused(target: Served, small_policy: Path, tmp_path: Path) -> None:
    assert "config.json" in refused(target, "/update_weights_from_disk", {"model_path": str(tmp_path)})
    assert "model_path" in refused(target, "/update_weights_from_disk", {})
    wider = make_tiny_policy(tmp_path / "wider", intermediate_size=64)
    assert "must have shape" in refused(target, "/update_weights_from_disk", {"model_path": str(wider)})
    turned = make_tiny_policy(tmp_path / "turned", rope_theta=5000.0)
    assert "rope_theta" in refused(target, "/update_weights_from_disk", {"model_path": str(turned)})
    other = {"model_path": str(small_policy), "selector": "draft"}
    assert "no weights" in refused(target, "/update_weights_from_disk", other)
    assert "selector" in refused(target, "/update_weights_from_disk", {**other, "selector": "both"})
    assert "load_format" in refused(target, "/update_weights_from_disk", {**other, "load_format": "dummy"})
    assert generated(target)[1]["weight_version"] == "default"


def test_a_tied_head_may_come_along_if_it_is_the_embedding(tmp_path: Path) -> None:
    policy = make_tiny_policy(tmp_path / "tied", tie_word_embeddings=True)
    weights = {name: tensor for name, tensor in other_weights(policy, seed=4).items() if name != "lm_head.weight"}
    with served(engine_config(policy)) as tied:
        tied.post("/begin_weight_update")
        head = weights["model.embed_tokens.weight"].clone()
        assert tied.post("/update_weights_from_tensor", payload({**weights, "lm_head.weight": head}))[0] == 200
        assert tied.post("/end_weight_update")[0] == 200
        tied.post("/begin_weight_update")
        body = payload({**weights, "lm_head.weight": head + 1})
        assert "tied" in refused(tied, "/update_weights_from_tensor", body)


def test_requests_that_run_go_on_over_an_update_and_say_which_version_made_which_token(
    own_server: Served, policy: Path, tmp_path: Path
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    folder = checkpoint(tmp_path / "next", policy, other_weights(policy, seed=5))
    params = {"max_new_tokens": 3000, "temperature": 0, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(own_server.generate, text="abc", sampling_params=params)
        own_server.wait_for(lambda state: state["num_running_reqs"] > 0)
        assert own_server.post("/pause_generation", {"mode": "in_place"})[0] == 200
        body = {"model_path": str(folder), "weight_version": "v1"}
        assert own_server.post("/update_weights_from_disk", body)[0] == 200
        assert own_server.post("/continue_generation")[0] == 200
        info = running.result(60)["meta_info"]
    first, second = info["weight_versions"]
    assert (first["version"], first["start"], second["version"], second["end"]) == ("default", 0, "v1", 3000)
    assert first["end"] == second["start"]
    assert info["weight_version"] == "v1"


def test_an_update_may_abort_what_is_running(own_server: Served, policy: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    params = {"max_new_tokens": 30_000, "temperature": 0, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(own_server.generate, text="abc", sampling_params=params)
        own_server.wait_for(lambda state: state["num_running_reqs"] > 0)
        body = {"model_path": str(policy), "weight_version": "v1", "abort_all_requests": True}
        assert own_server.post("/update_weights_from_disk", body)[0] == 200
        assert running.result(60)["meta_info"]["finish_reason"]["type"] == "abort"


@pytest.fixture(scope="module")
def drafted_config(small_policy: Path) -> Config:
    speculative = SpeculativeConfig(
        algorithm="STANDALONE", draft_model_path=str(small_policy), num_steps=3, eagle_topk=1
    )
    return replace(engine_config(small_policy), speculative=speculative)


def test_a_draft_update_changes_acceptance_and_neither_tokens_nor_the_targets_version(
    drafted_config: Config, small_policy: Path, tmp_path: Path
) -> None:
    stale = checkpoint(tmp_path / "stale", small_policy, other_weights(small_policy, seed=6))
    with served(drafted_config) as server:
        tokens, info = generated(server)
        before = server.get("/weights_checker")[1]["ranks"][0]["checksums"]
        body = {"model_path": str(stale), "selector": "draft", "weight_version": "ignored"}
        assert server.post("/update_weights_from_disk", body)[0] == 200
        after, worse = generated(server)
        assert after == tokens
        assert worse["spec_accept_length"] < info["spec_accept_length"]
        assert worse["weight_version"] == info["weight_version"] == "default"
        assert server.state()["draft_version"] == 1
        changed = server.get("/weights_checker")[1]["ranks"][0]["checksums"]
        differing = {name for name in before if before[name] != changed[name]}
        assert differing == {name for name in before if name.startswith("draft.")} != set()
        only = server.post("/weights_checker", {"selector": "draft"})[1]["ranks"][0]["checksums"]
        assert only.keys() == differing
        server.post("/begin_weight_update", {"selector": "draft"})
        assert "not for target" in refused(server, "/update_weights_from_tensor", {**payload({}), "selector": "target"})
        target = load_file(small_policy / "model.safetensors")
        overflow = damaged(target, "overflow")
        assert "infinite in the engine's" in refused(server, "/update_weights_from_tensor", payload(overflow))
        assert "infinite in the engine's" in refused(server, "/end_weight_update")
        assert server.state()["draft_version"] == 1
        server.post("/begin_weight_update", {"selector": "draft"})
        server.post("/update_weights_from_tensor", payload(load_file(small_policy / "model.safetensors")))
        assert server.post("/end_weight_update")[0] == 200
        assert generated(server)[1]["spec_accept_length"] == info["spec_accept_length"]
        assert server.state()["draft_version"] == 2


def test_target_weights_leave_a_draft_with_the_same_names_alone(
    drafted_config: Config, small_policy: Path, tmp_path: Path
) -> None:
    weights = other_weights(small_policy, seed=7)
    folder = checkpoint(tmp_path / "next", small_policy, weights)
    with served(drafted_config) as server:
        before = server.post("/weights_checker", {"selector": "draft"})[1]["per_engine_checksum"]
        assert server.post("/update_weights_from_disk", {"model_path": str(folder)})[0] == 200
        assert server.post("/weights_checker", {"selector": "draft"})[1]["per_engine_checksum"] == before
        tokens, stale = generated(server)
        server.post("/update_weights_from_disk", {"model_path": str(folder), "selector": "all"})
        again, fresh = generated(server)
        assert again == tokens
        assert fresh["spec_accept_length"] > stale["spec_accept_length"]
