"""SGLang's version in the interpreter that will run the servers, and what is known of each version."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from slime_spec.sglang.flags import sglang_version

ASK_TIMEOUT_S = 60.0
# importlib.metadata only: importing sglang takes seconds, and may fail for reasons that are not ours to find.
QUESTION = """
import json, re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
def of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
def files(package, pattern):
    spec = find_spec(package)
    return [path for root in (spec.submodule_search_locations if spec else ()) for path in Path(root).glob(pattern)]
types = {path.name for path in files("transformers", "models/*")}
for path in files("sglang", "srt/configs/*.py"):
    types.update(re.findall(r'model_type = "([^"]+)"', path.read_text(errors="replace")))
print("SLIME_SPEC " + json.dumps({"sglang": of("sglang"), "torch": of("torch"), "model_types": sorted(types)}))
"""


@dataclass(frozen=True)
class UpdateContract:
    """How a version takes new weights.

    ``reaches_draft`` are the transports whose update loads the draft too; ``selective`` those in which an update can
    be addressed to the target alone; ``draft_alone``: and to the draft alone.
    """

    name: str
    reaches_draft: frozenset[str]
    selective: frozenset[str]
    draft_alone: bool


FAN_OUT = UpdateContract("no control", frozenset({"tensor"}), frozenset(), draft_alone=False)
DISABLE_DRAFT = UpdateContract("disable_draft_model", frozenset({"tensor"}), frozenset({"tensor"}), draft_alone=False)
DISABLE_DRAFT_DISK = UpdateContract(
    "disable_draft_model", frozenset({"tensor", "disk"}), frozenset({"tensor"}), draft_alone=False
)
SELECTOR = UpdateContract(
    "selector in a begin/end session",
    frozenset({"tensor", "distributed", "disk"}),
    frozenset({"tensor", "distributed"}),
    draft_alone=True,
)


@dataclass(frozen=True)
class Release:
    """``Release((0, 5, 21), "0.5.21", is_installed=True, torch="2.13.0")``; not installed: the pinned version.

    ``model_types`` are those that its transformers and itself have configuration classes for; none: nobody was asked.
    """

    version: tuple[int, ...]
    text: str
    is_installed: bool
    torch: str | None = None
    model_types: frozenset[str] = frozenset()

    @property
    def update_contract(self) -> UpdateContract:
        for first, contract in (((0, 5, 21), SELECTOR), ((0, 5, 12), DISABLE_DRAFT_DISK), ((0, 5, 10), DISABLE_DRAFT)):
            if self.version >= first:
                return contract
        return FAN_OUT

    @property
    def metadata_keys(self) -> tuple[str, ...]:
        """What a response's meta_info calls the counters of correct and proposed drafts."""
        if self.version >= (0, 5, 12):
            return ("spec_num_correct_drafts", "spec_num_proposed_drafts")
        if self.version >= (0, 5, 11):
            return ("spec_accepted_drafts", "spec_proposed_drafts")
        return ("spec_accept_token_num", "spec_draft_token_num")


def release_of(
    text: str, is_installed: bool = True, torch: str | None = None, model_types: Iterable[str] = ()
) -> Release:
    """The release of a version string: "0.5.12.post1" is (0, 5, 12); a build from source ("0.0.0.dev1") the pinned."""
    version = _numbers(text)
    if not any(version):
        version = _numbers(sglang_version())
    return Release(version, text, is_installed, torch, frozenset(model_types))


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in found[0].split("."))[:3] if found else ()


def pinned_release() -> Release:
    """What the checks speak of where there is none to ask."""
    return release_of(sglang_version(), is_installed=False)


def find_release(python: str | None) -> Release:
    """Ask ``python`` (None: this interpreter); the pinned version where it has no SGLang or does not answer."""
    try:
        done = subprocess.run(
            [python or sys.executable, "-c", QUESTION], capture_output=True, text=True, timeout=ASK_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return pinned_release()
    answers = [line for line in done.stdout.splitlines() if line.startswith("SLIME_SPEC ")]
    answer: dict[str, Any] = json.loads(answers[-1].removeprefix("SLIME_SPEC ")) if answers else {}
    if answer.get("sglang") is None:
        return pinned_release()
    return release_of(answer["sglang"], torch=answer["torch"], model_types=answer["model_types"])
