"""Every trap is seen where it is, and is silent where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slime_spec.preflight.checks import TRAPS
from slime_spec.preflight.finding import Severity
from slime_spec.preflight.gate import examine
from tests.support.doctor_cases import CASES, EAGLE3, EAGLE3_TREE, HEAD
from tests.support.doctor_facts import MIMO, MTP, PLAIN, Case, make_facts


def named(each: Case) -> str:
    return f"{each.trap}-{each.sees or 'silent'}"


@pytest.mark.parametrize("each", CASES, ids=named)
def test_a_trap_is_seen_where_it_is_and_only_there(each: Case, tmp_path: Path) -> None:
    (trap,) = (trap for trap in TRAPS if trap.id == each.trap)
    finding = trap(make_facts(tmp_path, each.argv, **each.facts))
    assert (finding.severity if finding else None) == each.sees


def test_every_trap_has_a_case_that_sees_it_and_one_that_does_not() -> None:
    assert {each.trap for each in CASES if each.sees} == {trap.id for trap in TRAPS}
    assert {each.trap for each in CASES if each.sees is None} == {trap.id for trap in TRAPS}
    assert len({trap.id for trap in TRAPS}) == len(TRAPS)


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.id)
def test_every_trap_says_why_it_matters_and_links_to_it(trap) -> None:
    assert trap.why.endswith(".")
    assert trap.links
    assert all(link.startswith("https://") for link in trap.links)


@pytest.mark.parametrize(
    ("argv", "facts"),
    [(EAGLE3, HEAD), (EAGLE3_TREE, HEAD), (MTP, {"target": MIMO}), (PLAIN, {}), (("--num-rollout", "1"), {})],
    ids=["eagle3", "tree", "mtp", "plain", "embedded"],
)
def test_a_sound_configuration_has_nothing_worse_than_information(
    argv: tuple[str, ...], facts: dict[str, Any], tmp_path: Path
) -> None:
    found = examine([make_facts(tmp_path, argv, **facts)])
    assert [each.id for each in found if each.severity is not Severity.INFO] == []


def test_the_remedy_for_flashinfer_names_the_wider_sizes_and_that_disabling_padding_does_not_help(
    tmp_path: Path,
) -> None:
    argv = (*EAGLE3, "--sglang-attention-backend", "flashinfer", "--sglang-disable-cuda-graph-padding")
    found = {each.id: each for each in examine([make_facts(tmp_path, argv, **HEAD)])}
    assert "$(seq 1 32) $(seq 40 8 64) $(seq 80 16 160)" in found["flashinfer-graph-padding"].remedy
    assert "does not help" in found["graph-padding-switch"].why
    assert any(link.endswith("/9888") for link in found["flashinfer-graph-padding"].links)


@pytest.mark.parametrize(
    ("argv", "version", "says", "does"),
    [
        (EAGLE3, "0.5.21", "could draft by a table of batches", ("--speculative-adaptive",)),
        ((*EAGLE3, "--speculative-adaptive"), "0.5.21", "0.5.21 drafts by its table of batches", ()),
        (EAGLE3_TREE, "0.5.21", "at every batch, whether that pays or not (topk is 8)", ()),
        (EAGLE3, "0.5.13", "(SGLang 0.5.13 has no table of batches)", ()),
        (EAGLE3, "0.5.10.post1", "(SGLang 0.5.10.post1 does not have it)", ()),
    ],
)
def test_the_doctor_says_what_a_version_can_do_where_drafts_do_not_pay(
    argv: tuple[str, ...], version: str, says: str, does: tuple[str, ...], tmp_path: Path
) -> None:
    found = {each.id: each for each in examine([make_facts(tmp_path, argv, **HEAD, version=version)])}
    assert says in found["speculation-control"].read
    assert "spec/net_speedup_est is absent" in found["speculation-control"].read
    assert found["speculation-control"].fix == does


def test_one_below_the_bar_keeps_the_positions_above_it(tmp_path: Path) -> None:
    facts = make_facts(tmp_path, EAGLE3, **HEAD, acceptance=(0.85, 0.65, 0.3))
    (found,) = (each for each in examine([facts]) if each.id == "acceptance-bar")
    assert found.fix[:2] == ("--speculative-num-steps", "2")
    assert "85%, 65%, 30%" in found.read
