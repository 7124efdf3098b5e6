"""Real servers of three releases with the plug-in: what frameworks read, a draft that is pushed, kept and watched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.pushes import disturbed
from tests.support.sglang_real import PROMPTS, TABLES, Models
from tests.support.slime_way import Drafted, SlimeServer, Stored, arguments, launched_by_slime, payload

PINNED = ""  # the release of tests/support/sglang_cpu/requirements.txt
SERVERS = [("0.5.20", "STANDALONE"), ("0.5.20", "NEXTN"), (PINNED, "EAGLE3"), ("0.5.23", "STANDALONE")]
LOSES = {"SGLANG_STAND_IN_MEMORY_SAVER": "1"}  # a memory saver that loses what is released
NUM_TOKENS = 40

pytestmark = [
    pytest.mark.long,
    pytest.mark.sglang_server,
    pytest.mark.proves("rollout.sglang_engine.plugin", "tests.support.sglang_cpu"),
]


@dataclass(frozen=True)
class Served:
    server: SlimeServer
    algorithm: str
    target: Stored
    draft_folder: Path

    @property
    def draft(self) -> dict[str, torch.Tensor]:
        """The draft's own tensors, as its checkpoint has them."""
        stored = load_file(self.draft_folder / "model.safetensors")
        return {
            name: each
            for name, each in stored.items()
            if name not in TABLES and (self.algorithm != "NEXTN" or "mtp" in name)
        }

    def sums(self, side: str = "all") -> dict[str, str]:
        (rank,) = self.server.done("slime_spec/checksums", {"selector": side})["ranks"]
        return dict(rank["checksums"])

    def own_sums(self) -> dict[str, str]:
        """Of the draft's tensors that are not the target's; a STANDALONE draft has its own, and here equal ones."""
        of_target = set() if self.algorithm == "STANDALONE" else set(self.sums("target").values())
        return {name: each for name, each in self.sums("draft").items() if each not in of_target}

    def push(self, tensors: dict[str, torch.Tensor], **fields: Any) -> Any:
        return self.server.post("slime_spec/draft_weights", {"serialized_named_tensors": [payload(tensors)], **fields})

    def metas(self) -> list[dict[str, Any]]:
        sampling = {"temperature": 0.0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
        bodies = ({"input_ids": list(ids), "sampling_params": sampling} for ids in PROMPTS)
        return [self.server.done("generate", body)["meta_info"] for body in bodies]


def accepted_per_round(drafted: Drafted) -> float:
    return drafted.num_accepted / sum(drafted.num_rounds)


def folders(models: Models, algorithm: str) -> tuple[Path, Path]:
    """The target's and the draft's."""
    target = models.mimo if algorithm == "NEXTN" else models.target
    return target, models.eagle3 if algorithm == "EAGLE3" else target


@pytest.fixture(scope="module", params=SERVERS, ids=lambda param: f"{param[0] or 'pinned'}-{param[1]}")
def served(
    request: pytest.FixtureRequest, models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    release, algorithm = request.param
    folder = tmp_path_factory.mktemp("served")
    target, draft = folders(models, algorithm)
    stored = Stored.make(target, folder / "other")
    with launched_by_slime(arguments(models, algorithm, folder), folder, release, **LOSES) as server:
        yield Served(server, algorithm, stored, draft)


def test_slimes_arithmetic_on_its_answers_gives_what_the_server_counted(served: Served) -> None:
    for meta in served.metas():
        rate = meta["spec_accept_token_num"] / meta["spec_draft_token_num"]
        assert rate == pytest.approx(meta["spec_accept_rate"], rel=1e-12)
        assert meta["completion_tokens"] / meta["spec_verify_ct"] == pytest.approx(
            meta["spec_accept_length"], rel=1e-12
        )
        assert meta["spec_accept_histogram"] == meta["spec_correct_drafts_histogram"]
        assert sum(meta["speculative_accepted_tokens_per_pos"]) == meta["spec_num_correct_drafts"]
        assert len(meta["speculative_accepted_tokens_per_pos"]) == 3


def test_a_draft_is_pushed_alone_by_tensors_and_by_folder(served: Served) -> None:
    target, draft, own, drafted = (
        served.sums("target"),
        served.sums("draft"),
        served.own_sums(),
        served.server.drafted(),
    )
    assert own
    told = served.push(disturbed(served.draft, seed=3), draft_version=7).json()
    assert (told["success"], told["draft_version"]) == (True, "7")
    assert served.server.info()["slime_spec_plugin"]["endpoints"] == {"draft_version": "7"}
    changed = served.sums("draft")
    assert {name for name in draft if changed[name] != draft[name]} >= {name for name in own if "rotary" not in name}
    assert served.sums("target") == target
    other = served.server.drafted()
    assert other.token_ids == drafted.token_ids, "drafts never change what is generated"
    served.server.done("slime_spec/draft_weights", {"path": str(served.draft_folder)})
    assert (served.sums("target"), served.sums("draft")) == (target, draft)
    assert served.server.drafted() == drafted
    if served.algorithm == "STANDALONE":  # the draft is the target itself: drafts are accepted
        assert accepted_per_round(drafted) > 0.3 > 0.1 > accepted_per_round(other)


def test_a_push_that_is_not_whole_or_not_readable_changes_nothing(served: Served) -> None:
    sums, drafted = served.sums(), served.server.drafted()
    *most, last = served.draft
    refused = served.push({name: served.draft[name] for name in most})
    assert (refused.status_code, refused.json()["success"]) == (400, False)
    assert f"lacks {last}" in refused.json()["message"]
    garbage = served.server.post("slime_spec/draft_weights", {"serialized_named_tensors": ["AAAA"]})
    nowhere = served.server.post("slime_spec/draft_weights", {"path": "/no/such/folder"})
    neither = served.server.post("slime_spec/draft_weights", {})
    assert [each.status_code for each in (garbage, nowhere, neither)] == [400, 400, 400]
    assert "either path" in neither.json()["message"]
    assert (served.sums(), served.server.drafted()) == (sums, drafted)


def test_checksums_are_the_servers_own_by_side(served: Served) -> None:
    both = served.server.checksums()
    assert {**served.sums("target"), **served.sums("draft")} == both == served.sums()
    assert not [name for name in served.sums("target") if name.startswith("draft.")]


def test_the_canary_sees_exact_speculation_and_a_draft_that_is_lost(served: Served) -> None:
    first = served.server.done("slime_spec/canary")
    assert (first["is_greedy"], first["num_differing"], first["num_tokens"]) == (True, 0, 32)
    assert first["largest_logprob_difference"] < 1e-3
    assert first["num_rounds"] > 0
    served.push(disturbed(served.draft, seed=3))
    lost = served.server.done("slime_spec/canary")
    assert lost["is_greedy"] is True
    if served.algorithm == "STANDALONE":
        assert (first["is_accepted_as_before"], lost["is_accepted_as_before"]) == (True, False)
    served.server.done("slime_spec/draft_weights", {"path": str(served.draft_folder)})
    refused = served.server.post("slime_spec/canary", {"max_new_tokens": 1})
    assert (refused.status_code, "at least 2" in refused.json()["message"]) == (400, True)


def test_a_draft_outlives_the_release_of_its_memory(served: Served) -> None:
    draft, drafted = served.own_sums(), served.server.drafted()
    served.server.pause_and_flush()
    served.server.done("release_memory_occupation")
    assert not set(served.sums("draft").values()) & set(draft.values())
    refused = served.push(served.draft)
    assert (refused.status_code, "resume its memory first" in refused.json()["message"]) == (400, True)
    served.server.done("resume_memory_occupation")
    assert draft.items() <= served.sums("draft").items()
    served.server.done("continue_generation")
    served.server.update("tensors", served.target.first, "1")
    assert served.server.drafted() == drafted
    shown = served.server.info()["internal_states"][0]["slime_spec_plugin"]["kept_draft"]
    assert shown["num_kept"] == shown["num_put_back"] > 0


def test_without_it_the_draft_is_lost_and_nothing_says_so(models: Models, tmp_path: Path) -> None:
    stored = Stored.make(models.target, tmp_path / "other")
    given = arguments(models, "STANDALONE", tmp_path)
    off = {"SLIME_SPEC_PLUGIN_OFF": "kept_draft"}
    with launched_by_slime(given, tmp_path, "0.5.23", **LOSES, **off) as server:
        before = server.drafted()
        server.pause_and_flush()
        server.done("release_memory_occupation")
        server.done("resume_memory_occupation")
        server.done("continue_generation")
        server.update("tensors", stored.first, "1")
        after = server.drafted()
    assert after.token_ids == before.token_ids
    assert accepted_per_round(before) > 0.3 > 0.1 > accepted_per_round(after)
