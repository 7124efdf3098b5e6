"""The worker runs in a peer's own Python, without slime_spec: it loads a driver and answers requests as JSON lines.

    python worker.py DRIVER.py SETTINGS        SETTINGS: a JSON object for the driver's ``load``
    stdout   {"ready": {"version": "0.32.0", ...}}                       once
    stdin    {"prompts": [[1, 2, 3], ...], "num_new_tokens": 128, "stop_token_ids": []}        a request
    stdout   {"token_ids": [[...], ...], "num_passes": 128}              its answer (greedy, in the prompts' order)

The driver file defines ``load(settings)``, which returns an object with ``about`` (a dict) and
``generate(prompts, num_new_tokens, stop_token_ids) -> (token_ids, num_passes)``. Only a stop token (which the reply
then contains) ends a reply early, no EOS of the engine's own. ``num_passes`` are target passes after the prefill,
summed over sequences; null where unknown.
Whatever the engine prints goes to stderr. The process ends when stdin does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import Any


def load_driver(path: str, settings: dict[str, Any]) -> Any:
    """Load the file, and return the driver that its ``load`` makes."""
    spec = importlib.util.spec_from_file_location("driver", path)
    assert spec is not None, f"{path} is not a Python file"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(settings)


def main() -> None:
    # Engines print to stdout at any time: keep the real stdout for answers alone.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    driver = load_driver(sys.argv[1], json.loads(sys.argv[2]))
    print(json.dumps({"ready": driver.about}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        token_ids, num_passes = driver.generate(**request)
        print(json.dumps({"token_ids": token_ids, "num_passes": num_passes}), file=answers)


if __name__ == "__main__":
    main()
