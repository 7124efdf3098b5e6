"""Write the tiny policy and the tiny EAGLE-3 draft of rehearsals into policy/ and draft/: ``stand_ins.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.tiny_drafts import EAGLE3, make_tiny_draft
from tests.support.tiny_policy import make_tiny_policy

CONTEXT = 4096


def main(folder: Path) -> int:
    policy = make_tiny_policy(folder / "policy", max_position_embeddings=CONTEXT)
    make_tiny_draft(folder / "draft", policy, {**EAGLE3, "vocab_size": 257, "max_position_embeddings": CONTEXT})
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
