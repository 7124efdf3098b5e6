"""SGLang's version in the interpreter that will run the servers, and what is known of each version."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass

from slime_spec.launch.sglang_table import sglang_version

ASK_TIMEOUT_S = 60.0
# importlib.metadata only: importing sglang takes seconds, and may fail for reasons that are not ours to find.
QUESTION = """
import json
from importlib.metadata import PackageNotFoundError, version
def of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
print(json.dumps({"sglang": of("sglang"), "torch": of("torch")}))
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
    """``Release((0, 5, 21), "0.5.21", is_installed=True, torch="2.13.0")``; not installed: the pinned version."""

    version: tuple[int, ...]
    text: str
    is_installed: bool
    torch: str | None = None

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


def release_of(text: str, is_installed: bool = True, torch: str | None = None) -> Release:
    """The release of a version string: "0.5.12.post1" is (0, 5, 12)."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    version = tuple(int(number) for number in numbers[0].split("."))[:3] if numbers else ()
    return Release(version, text, is_installed, torch)


def find_release(python: str | None) -> Release:
    """Ask ``python`` (None: this interpreter); the pinned version where it has no SGLang or does not answer."""
    try:
        done = subprocess.run(
            [python or sys.executable, "-c", QUESTION], capture_output=True, text=True, timeout=ASK_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return release_of(sglang_version(), is_installed=False)
    answer = json.loads(done.stdout) if done.returncode == 0 else {"sglang": None}
    if answer["sglang"] is None:
        return release_of(sglang_version(), is_installed=False)
    return release_of(answer["sglang"], is_installed=True, torch=answer["torch"])
