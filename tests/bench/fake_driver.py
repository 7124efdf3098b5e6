"""A peer that costs nothing: replies count upwards from the prompt's last token. Settings: scripted mishaps."""

import os
import sys
import time
from typing import Any


class FakeDriver:
    def __init__(self, settings: dict[str, Any]) -> None:
        if settings.get("die_at_load"):
            sys.exit("no such model")
        self._settings = settings
        self.about = {"engine": "fake", "threads": os.environ["OMP_NUM_THREADS"], "pythonpath": os.getenv("PYTHONPATH")}
        sys.stdout.write("engines print what they like to stdout\n")

    def generate(
        self, prompts: list[list[int]], num_new_tokens: int, stop_token_ids: list[int]
    ) -> tuple[list[list[int]], int | None]:
        started = time.process_time()
        while time.process_time() - started < self._settings.get("busy_s", 0):
            pass
        if self._settings.get("die_when_asked"):
            sys.exit("out of memory")
        replies = []
        for prompt in prompts:
            reply = [prompt[-1] + 1 + i for i in range(num_new_tokens - self._settings.get("tokens_short", 0))]
            ends = [i for i, token in enumerate(reply) if token in stop_token_ids]
            replies.append(reply[: ends[0] + 1] if ends else reply)
        return replies, self._settings.get("passes", sum(map(len, replies)))


def load(settings: dict[str, Any]) -> FakeDriver:
    return FakeDriver(settings)
