"""The stand-ins for slime and miles are on the path; each test has hooks of its own, as each process has."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slime_spec.integrations import miles, slime
from slime_spec.integrations.framework import MILES, SLIME
from slime_spec.integrations.plugin import Plugin

FRAMEWORKS = str(Path(__file__).resolve().parents[1] / "support" / "frameworks")
if FRAMEWORKS not in sys.path:
    sys.path.append(FRAMEWORKS)  # last, so that an installed framework is what a process of a user's own would see
HOOKS = "slime_spec.integrations.slime"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugin]:
    """The hooks of slime, as a fresh process has them."""
    monkeypatch.delenv("SLIME_SPEC_PLUGIN", raising=False)
    made = Plugin(SLIME)
    monkeypatch.setattr(slime, "PLUGIN", made)
    yield made
    made.close()


@pytest.fixture
def miles_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugin]:
    made = Plugin(MILES)
    monkeypatch.setattr(miles, "PLUGIN", made)
    yield made
    made.close()


@pytest.fixture
def logged() -> Iterator[list[dict[str, Any]]]:
    """What the framework has logged in the test."""
    from slime.observability.rollout_metrics import LOGGED

    LOGGED.clear()
    yield LOGGED
    LOGGED.clear()


@pytest.fixture
def slime_args() -> Callable[..., Namespace]:
    """slime's args, with the hooks in them, for a server at ``host:port``."""

    def made(address: str = "", hooks: str = HOOKS, **changed: Any) -> Namespace:
        host, _, port = address.removeprefix("http://").rpartition(":")
        args = Namespace(
            sglang_router_ip=host or None,
            sglang_router_port=int(port) if port else None,
            sglang_speculative_algorithm="EAGLE",
            custom_generate_function_path=f"{hooks}.generate",
            custom_rollout_log_function_path=f"{hooks}.log_rollout",
            custom_eval_rollout_log_function_path=f"{hooks}.log_eval",
            load_debug_rollout_data=None,
            rollout_seed=1,
            hf_checkpoint=None,
        )
        vars(args).update(changed)
        return args

    return made
