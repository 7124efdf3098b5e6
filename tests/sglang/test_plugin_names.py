"""The names that the plug-in hooks and uses, in every release from slime's pin to the newest: read, never imported."""

from __future__ import annotations

import subprocess

import pytest

from rollout.sglang_engine.plugin.entry import FEATURES
from rollout.sglang_engine.plugin.hooks import Contract, Feature, Name
from slime_spec.sglang.releases import NEWEST_READ
from tests.support.sglang_names import Facts, Sources, facts_of, key, recorded, used, wheel
from tests.support.sglang_real import ROOT

RELEASES, FACTS = recorded()
SLIMES_PIN = "0.5.15"
UPDATER = "sglang.srt.managers.scheduler_components.weight_updater"
MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"


def fits(name: Name, release: str) -> bool:
    fact = FACTS[name.target][release]
    used = {*name.members, *name.attributes}
    if fact is None or not used:
        return fact == name.parameters
    return used <= set(fact)


def contract_of(feature: Feature, release: str) -> Contract | None:
    """What the plug-in would hook in a main process that has loaded everything."""
    return next((each for each in feature.contracts if all(fits(name, release) for name in each.names)), None)


def covers(text: str, release: str) -> bool:
    """Whether "0.5.16 to 0.5.20" names a release; a post-release is its release's."""
    first, _, last = text.partition(" to ")
    return key(first) <= key(release)[:3] <= key(last or first)


def test_the_facts_are_of_every_release_from_slimes_pin_to_the_newest_read() -> None:
    assert (RELEASES[0], RELEASES[-1]) == (SLIMES_PIN, NEWEST_READ)
    assert {key(release)[:3] for release in RELEASES} == {(0, 5, patch) for patch in range(15, 24)}


def test_the_facts_are_of_the_names_that_the_plug_in_uses() -> None:
    """Otherwise: python -m tests.support.sglang_names"""
    assert sorted(FACTS) == [name.target for name in used()]


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_every_release_is_served_by_the_contract_that_says_so(feature: Feature) -> None:
    taken = {release: contract_of(feature, release) for release in RELEASES}
    assert None not in taken.values()
    for contract in feature.contracts:
        assert [release for release in RELEASES if taken[release] == contract] == [
            release for release in RELEASES if covers(contract.releases, release)
        ]


def test_what_was_seen_to_change_between_releases_is_in_the_facts() -> None:
    """By hand, from the sources."""
    made = FACTS[f"{MANAGER}.__init__"]
    assert (made["0.5.16"], made["0.5.17"]) == (
        ("self", "server_args", "port_args"),
        ("self", "server_args", "port_args", "start_pd_bootstrap_service"),
    )
    begun = FACTS["sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.begin_weight_update"]
    assert (begun["0.5.20"], begun["0.5.21"]) == (None, ("self",))
    # A method of TokenizerManager's base, in a module of its own.
    assert FACTS[f"{MANAGER}.update_weights_from_tensor"]["0.5.15"] == ("self", "obj", "request")


MADE_UP = Sources(
    {
        "sglang/srt/base.py": "class Base:\n  field: int = 0\n  async def inherited(self, obj, *, request=None): ...\n",
        "sglang/srt/main.py": (
            "from sglang.srt.base import Base as Parent\n"
            "class Own:\n  def late(self): ...\n"
            "class Manager(Parent, Own):\n  slot: str\n  BEST = 1\n"
            "  def update(self, a, /, b, *rest, c, **more): self.set = b.other\n"
            "def free(x): ...\n"
        ),
        "sglang/srt/pack/__init__.py": "def inside(): ...\n",
    }
)


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        (Name("sglang.srt.main.free"), ("x",)),
        (Name("sglang.srt.pack.inside"), ()),
        (Name("sglang.srt.main.Manager.update"), ("self", "a", "b", "rest", "c", "more")),
        (Name("sglang.srt.main.Manager.inherited"), ("self", "obj", "request")),
        (Name("sglang.srt.main.Manager.late"), ("self",)),
        (Name("sglang.srt.main.Manager", members=("field", "gone", "late", "slot")), ("field", "late", "slot")),
        (Name("sglang.srt.main.Manager", members=("BEST",), attributes=("other", "set")), ("BEST", "set")),
        (Name("sglang.srt.main.Manager.gone"), None),
        (Name("sglang.srt.main.gone"), None),
        (Name("sglang.srt.gone.free"), None),
    ],
)
def test_a_fact_is_read_from_sources_as_python_would_find_it(name: Name, fact: tuple[str, ...] | None) -> None:
    assert MADE_UP.fact(name) == fact


@pytest.mark.long
@pytest.mark.proves("tests.support.sglang_names")
def test_the_wheels_say_what_was_recorded() -> None:
    try:
        for release in RELEASES:
            wheel(release)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"pip cannot download SGLang's wheels here: {error.stderr.decode()[-200:]}")
    read: Facts = facts_of(RELEASES, used())
    assert read == FACTS


def test_the_documents_log_line_is_that_release_s() -> None:
    release = "0.5.21"
    contracts = {feature.name: contract_of(feature, release) for feature in FEATURES}
    active = ", ".join(f"{name} (as of {each.releases})" for name, each in contracts.items() if each is not None)
    line = f"slime_spec plug-in: process=scheduler sglang={release} active={active}\n"
    assert line in (ROOT / "docs" / "plug-in.md").read_text()
