"""SGLang calls ``activate`` in each process that it starts, through the entry-point group ``sglang.srt.plugins``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version

from rollout.sglang_engine.plugin import info
from rollout.sglang_engine.plugin.fit import fitting
from rollout.sglang_engine.plugin.hooks import Contract, Feature, Hook
from rollout.sglang_engine.plugin.state import ALL, OFF, STATE, logger, turned_off

FEATURES: tuple[Feature, ...] = (info.FEATURE,)
# SGLang's functions that run a process, and how it is called here.
PROCESSES = {
    "run_scheduler_process": "scheduler",
    "run_detokenizer_process": "detokenizer",
    "run_data_parallel_controller_process": "data-parallel controller",
}
HOOKED = ("main", "scheduler")


def activate() -> None:
    """Hooks what fits, and says in one line what is active and in one line each what is not."""
    STATE.process, STATE.sglang = this_process(), version("sglang")
    if STATE.process not in HOOKED:
        return
    off = turned_off()
    if unknown := off - {ALL, *(feature.name for feature in FEATURES)}:
        known = ", ".join([ALL, *(feature.name for feature in FEATURES)])
        logger.warning("slime_spec plug-in: %s names %s; known are %s", OFF, ", ".join(sorted(unknown)), known)
    for feature in FEATURES:
        if ALL in off or feature.name in off:
            STATE.inactive[feature.name] = f"turned off by {OFF}"
        else:
            hook(feature)
    active = ", ".join(f"{name} (as of {releases})" for name, releases in STATE.active.items()) or "nothing"
    logger.warning("slime_spec plug-in: process=%s sglang=%s active=%s", STATE.process, STATE.sglang, active)


def hook(feature: Feature) -> None:
    contract, misfits = fitting(feature.contracts)
    if contract is None:
        STATE.inactive[feature.name] = " | ".join(misfits)
        logger.error(
            "slime_spec plug-in: %s is NOT active, as SGLang %s differs from every release that it knows: %s",
            feature.name,
            STATE.sglang,
            STATE.inactive[feature.name],
        )
        return
    register(contract)
    STATE.active[feature.name] = contract.releases


def register(contract: Contract) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for each in contract.hooks:
        if wanted(each):
            HookRegistry.register(each.name.target, each.function, HookType(each.kind))


def wanted(each: Hook) -> bool:
    """Hooks of the schedulers are registered wherever the process may be one, whatever SGLang calls its functions."""
    if each.only_where_loaded and each.name.target.rpartition(".")[0] not in sys.modules:
        return False
    return each.process == "scheduler" or STATE.process != "scheduler"


def this_process() -> str:
    """The process's role, by the function of SGLang that is loading plug-ins; main where none is known."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in PROCESSES:
            return PROCESSES[frame.f_code.co_name]
        frame = frame.f_back  # type: ignore[assignment]
    return "main"
