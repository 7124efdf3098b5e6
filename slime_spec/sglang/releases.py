"""Each record says what an SGLang release does differently from the release before it, oldest first.

A release does what all records up to its version say. All code that depends on a release asks this module; only
``sglang/flags.json``, the table of flags, belongs to one version alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from slime_spec.sglang.flags import sglang_version
from slime_spec.sglang.metadata import ACCEPT_TOKENS, ACCEPTED_DRAFTS, CORRECT_DRAFTS, Generation

Style = Literal["none", "flag", "selector"]
Ability = Literal[
    "refuses_longer_draft_context",  # without: a server starts and reads beyond the tables of its draft
    "widens_rotary_tables",  # without: the overwriting variable lets a server start whose draft's table stays short
    "resets_padded_positions",  # what a padded batch leaves in the buffers of draft passes (#10892)
    "keeps_draft_copy",  # --enable-draft-weights-cpu-backup
    "pads_verify_mask",
    "pads_ngram_mask",
    "refuses_other_adaptive_steps",  # without: adaptive speculation starts at another candidate
    "takes_corpora",  # of an n-gram server, over HTTP while it runs
    "drafts_by_batch",  # adaptive speculation has a table of batches, with 0 steps at large ones
    "seeds_verify",  # without: the uniforms of a verify pass are the engine's own
]


@dataclass(frozen=True)
class WeightContract:
    """Says how a release takes new weights.

    ``field`` is the field of a tensor update that says whom it is for, by which a running server shows its contract.
    ``reaches_draft`` are the transports whose update loads the draft too; ``selective`` those in which an update can
    be addressed to the target alone.
    """

    style: Style
    name: str
    field: str | None
    reaches_draft: frozenset[str]
    selective: frozenset[str]

    @property
    def draft_alone(self) -> bool:
        """Return whether an update can be addressed to the draft alone."""
        return self.style == "selector"


FAN_OUT = WeightContract("none", "no control", None, frozenset({"tensor"}), frozenset())
DISABLE_DRAFT = WeightContract(
    "flag", "disable_draft_model", "disable_draft_model", frozenset({"tensor"}), frozenset({"tensor"})
)
DISABLE_DRAFT_DISK = WeightContract(
    "flag", "disable_draft_model", "disable_draft_model", frozenset({"tensor", "disk"}), frozenset({"tensor"})
)
SELECTOR = WeightContract(
    "selector",
    "selector in a begin/end session",
    "selector",
    frozenset({"tensor", "distributed", "disk"}),
    frozenset({"tensor", "distributed"}),
)


@dataclass(frozen=True)
class Change:
    """Records abilities that one release and every later release have, and values that replace earlier values.

    ``adaptive_steps`` are the numbers of steps between which adaptive speculation moves; none: it does not exist.
    """

    version: str
    abilities: tuple[Ability, ...] = ()
    weight_contract: WeightContract | None = None
    metadata: Generation | None = None
    adaptive_steps: tuple[int, ...] | None = None


# Read in the wheels of these versions.
CHANGES = (
    Change("0.0.0", weight_contract=FAN_OUT, metadata=ACCEPT_TOKENS, adaptive_steps=()),
    Change("0.5.1", ("refuses_longer_draft_context",)),
    Change("0.5.3", ("widens_rotary_tables", "resets_padded_positions")),
    Change("0.5.6", ("keeps_draft_copy",)),
    Change("0.5.7", ("pads_verify_mask",)),
    Change("0.5.10", weight_contract=DISABLE_DRAFT),
    Change("0.5.11", ("takes_corpora",), metadata=ACCEPTED_DRAFTS),
    Change("0.5.12", weight_contract=DISABLE_DRAFT_DISK, metadata=CORRECT_DRAFTS, adaptive_steps=(1, 3, 7)),
    Change("0.5.14", ("refuses_other_adaptive_steps", "pads_ngram_mask", "drafts_by_batch")),
    Change("0.5.17", ("seeds_verify",)),
    Change("0.5.20", adaptive_steps=(1, 3, 5, 7)),
    Change("0.5.21", weight_contract=SELECTOR),
)

NEWEST_READ = "0.5.23"


def was_read(text: str) -> bool:
    """Return whether a version is no newer than what was read; a build from source ("0.0.0.dev1") is."""
    return (0, 0, 0) < _numbers(text) <= _numbers(NEWEST_READ)


def since(fact: Ability | WeightContract | Generation) -> str:
    """Return the first release with an ability, a weight contract or a generation of metadata: "0.5.21"."""
    return next(each.version for each in CHANGES if fact in (*each.abilities, each.weight_contract, each.metadata))


@dataclass(frozen=True)
class Release:
    """Describes one SGLang release, with what was found installed.

    Example: ``Release((0, 5, 21), "0.5.21", is_installed=True, torch="2.13.0")``. Without an installed SGLang it is
    the pinned version. ``model_types`` are those that SGLang and its transformers have classes for; empty where no
    interpreter was asked.
    """

    version: tuple[int, ...]
    text: str
    is_installed: bool
    torch: str | None = None
    model_types: frozenset[str] = frozenset()

    @property
    def changes(self) -> tuple[Change, ...]:
        """Return the records that hold for this release, newest first."""
        return tuple(each for each in reversed(CHANGES) if _numbers(each.version) <= self.version)

    def does(self, ability: Ability) -> bool:
        return any(ability in each.abilities for each in self.changes)

    @property
    def weight_contract(self) -> WeightContract:
        return next(each.weight_contract for each in self.changes if each.weight_contract is not None)

    @property
    def metadata(self) -> Generation:
        """Return the names of the counters in a response's meta_info."""
        return next(each.metadata for each in self.changes if each.metadata is not None)

    @property
    def adaptive_steps(self) -> tuple[int, ...]:
        return next(each.adaptive_steps for each in self.changes if each.adaptive_steps is not None)


def release_of(
    text: str, is_installed: bool = True, torch: str | None = None, model_types: Iterable[str] = ()
) -> Release:
    """Return the release of a version string: "0.5.12.post1" is (0, 5, 12).

    A build from source ("0.0.0.dev1") the pinned.
    """
    version = _numbers(text)
    if not any(version):
        version = _numbers(sglang_version())
    return Release(version, text, is_installed, torch, frozenset(model_types))


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in found[0].split("."))[:3] if found else ()


def pinned_release() -> Release:
    """Return the release that the checks assume where there is no SGLang to ask."""
    return release_of(sglang_version(), is_installed=False)
