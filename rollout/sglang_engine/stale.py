"""A server that shows no weights still says, by its checksums, which tensors a push has left as they were.

Two pushes in a row and what the server computes behind each:

    pushed      q_a_proj, kv_a_proj_with_mqa: other values than in the push before
    served      fused_qkv_a_proj_with_mqa:    the checksum of the push before     -> stale

How the server computes a checksum does not matter, nor how its ranks share a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# What SGLang makes one tensor of, by the end of its name.
FUSED = {
    ".qkv_proj.": (".q_proj.", ".k_proj.", ".v_proj."),
    ".gate_up_proj.": (".gate_proj.", ".up_proj."),
    ".fused_qkv_a_proj_with_mqa.": (".q_a_proj.", ".kv_a_proj_with_mqa."),
}
OF_EXPERTS = {"w13_weight": ("gate_proj", "up_proj"), "w2_weight": ("down_proj",)}
EXPERT = re.compile(r"(.*\.experts\.)\d+\.(\w+)\.weight")


@dataclass(frozen=True)
class Served:
    """Holds what a push brought and what the server then had: checksums by name, the server's as ``RANK:NAME``."""

    pushed: Mapping[str, int]
    sums: Mapping[str, str]


def stale_tensors(before: Served, now: Served) -> list[str] | None:
    """Return the server's tensors that are as before, though the push changed all that they are made of.

    None where the server has no tensor of which that can be said.
    """
    changed = {name for name, checksum in now.pushed.items() if before.pushed.get(name) != checksum}
    made_of = dict(_parts(now.pushed))
    moved: dict[str, bool] = {}
    for key, checksum in now.sums.items():
        name = key.partition(":")[2]
        if (parts := made_of.get(name)) and changed.issuperset(parts):
            # A slice of a tensor that changed elsewhere may be as it was: some rank's must differ.
            moved[name] = moved.get(name, False) or before.sums.get(key) != checksum
    return [name for name, is_other in moved.items() if not is_other] if moved else None


def _parts(pushed: Mapping[str, int]) -> Iterator[tuple[str, list[str]]]:
    """Yield the names that a server may have for what is pushed, and the pushed tensors that each is made of."""
    experts: dict[str, list[str]] = {}
    for name in pushed:
        yield name, [name]
        for fused, parts in FUSED.items():
            if parts[0] in name:
                others = [name.replace(parts[0], part) for part in parts]
                if all(other in pushed for other in others):
                    yield name.replace(parts[0], fused), others
        if match := EXPERT.fullmatch(name):
            for fused, projections in OF_EXPERTS.items():
                if match[2] in projections:
                    experts.setdefault(match[1] + fused, []).append(name)
    yield from experts.items()
