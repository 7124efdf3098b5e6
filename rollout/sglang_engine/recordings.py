"""The recordings hold real SGLang servers' answers, of several releases, for the fake server and for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

RECORDINGS = Path(__file__).with_name("recordings.json")


@cache
def recordings() -> Mapping[str, Any]:
    data: Mapping[str, Any] = json.loads(RECORDINGS.read_text())
    return data
