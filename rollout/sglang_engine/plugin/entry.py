"""SGLang calls ``activate`` in each process that it starts, through the entry-point group ``sglang.srt.plugins``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Container, Mapping, Sequence
from importlib.metadata import version

from rollout.sglang_engine.plugin import draft_push, draft_safe, endpoints, info, kept_draft, metadata
from rollout.sglang_engine.plugin.fit import fitting
from rollout.sglang_engine.plugin.hooks import Feature, Hook
from rollout.sglang_engine.plugin.state import ALL, OFF, STATE, State, logger, turned_off

# A later feature's hook is outside an earlier feature's on the same function.
FEATURES: tuple[Feature, ...] = (
    draft_safe.FEATURE,
    metadata.FEATURE,
    draft_push.FEATURE,
    kept_draft.FEATURE,
    endpoints.FEATURE,
    info.FEATURE,
)
# SGLang's functions that run a process, and how that is called here.
PROCESSES = {
    "run_scheduler_process": "scheduler",
    "run_detokenizer_process": "detokenizer",
    "run_data_parallel_controller_process": "data-parallel controller",
}
HOOKED = ("main", "scheduler")


def activate() -> None:
    """Hooks what fits this SGLang, for it to apply when all its plug-ins have run."""
    STATE.process, STATE.sglang = this_process(), version("sglang")
    if STATE.process not in HOOKED:
        return
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    for hook in choose(FEATURES, STATE, os.environ, sys.modules):
        registry.HookRegistry.register(hook.name.target, hook.function, registry.HookType(hook.kind))


def choose(
    features: Sequence[Feature], state: State, environment: Mapping[str, str], modules: Container[str]
) -> list[Hook]:
    """Returns the hooks of what fits and is not turned off; says in a line what is active, and what is not, and why."""
    off, known = turned_off(environment), [ALL, *(feature.name for feature in features)]
    if unknown := off - set(known):
        logger.error("slime_spec plug-in: %s names %s; known are %s", OFF, ", ".join(sorted(unknown)), ", ".join(known))
    hooks: list[Hook] = []
    for feature in features:
        if off & {ALL, feature.name}:
            state.inactive[feature.name] = f"turned off by {OFF}"
            continue
        contract, misfits = fitting([each.within(state.process, modules) for each in feature.contracts])
        if contract is None:
            state.leave_out(feature.name, " | ".join(misfits))
            continue
        state.active[feature.name] = contract.releases
        hooks += contract.hooks
    active = ", ".join(f"{name} (as of {releases})" for name, releases in state.active.items()) or "nothing"
    logger.warning("slime_spec plug-in: process=%s sglang=%s active=%s", state.process, state.sglang, active)
    return hooks


def this_process() -> str:
    """The process's role, by the function of SGLang that is loading plug-ins; main where none is known."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in PROCESSES:
            return PROCESSES[frame.f_code.co_name]
        frame = frame.f_back  # type: ignore[assignment]
    return "main"
