"""A scheduler replaces its draft's weights alone, which no release up to 0.5.20 can, and all of them or none.

The request is SGLang's own for tensors, with a load format that no release knows: ``MARK`` for tensors that come with
it, ``MARK=FOLDER`` for those of a checkpoint.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rollout.sglang_engine.plugin.draft_safe import (
    ALGORITHM,
    MESSAGES,
    RUNNERS,
    UPDATER,
    UPDATES,
    DraftSafeUpdates,
)
from rollout.sglang_engine.plugin.hooks import Contract, Feature, Hook, Name
from rollout.sglang_engine.plugin.ranks import told_by_all
from rollout.sglang_engine.plugin.sessions import Messages, sglang_messages
from rollout.sglang_engine.plugin.state import STATE, Detail, logger

NAME = "draft_push"
MARK = "slime_spec.draft"
AS_IT_WAS = "The draft is as it was."
COUNTS = {"done": 0, "refused": 0}
RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
RUNNER_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"


@dataclass(frozen=True)
class Layout:
    """How the releases of one generation load tensors into a runner's model, with the names that this rests on.

    ``loader`` is the object that loads; with ``has_session`` its calls are between two more, for packed weights.
    """

    loader: Callable[[Any], Any]
    has_session: bool
    needs: tuple[Name, ...]

    def load(self, runner: Any, tensors: list[Any]) -> None:
        """Raises PushError where SGLang says that it did not load them."""
        from slime_spec.errors import PushError

        loader = self.loader(runner)
        if self.has_session:
            loader.begin_weight_update()
        try:
            is_loaded, message = loader.update_weights_from_tensor(named_tensors=tensors, load_format=None)
        finally:
            if self.has_session:
                loader.end_weight_update(run_post_load=False)
        if not is_loaded:
            raise PushError(message)


def push(
    layout: Layout,
    original: Callable[..., Any],
    updater: Any,
    recv_req: Any,
    *,
    updates: DraftSafeUpdates = UPDATES,
    messages: Messages = sglang_messages,
) -> Any:
    """Answers a push of the draft; every other request is SGLang's."""
    mark, _, folder = str(recv_req.load_format or "").partition("=")
    if mark != MARK:
        return original(updater, recv_req)
    answer = messages().UpdateWeightsFromTensorReqOutput
    if problem := refusal(updater, updates):
        return answer(success=False, message=refused(f"{problem}. {AS_IT_WAS}"))
    from pathlib import Path

    from rollout.sglang_engine.plugin import new_draft
    from slime_spec.errors import PushError

    draft = updates.draft.of(updater)
    if folder:
        read = partial(new_draft.of_folder, Path(folder), draft)
    else:
        read = partial(new_draft.of_request, recv_req.serialized_named_tensors, updater)
    try:
        num_tensors = new_draft.replace_draft(updater, draft, read, layout.load)
    except new_draft.NotPutBackError as error:
        return answer(success=False, message=refused(str(error)))
    except PushError as error:
        return answer(success=False, message=refused(f"{error}. {AS_IT_WAS}"))
    COUNTS["done"] += 1
    message = f"replaced the draft's weights tensors={num_tensors}"
    if recv_req.flush_cache and not updater.flush_cache(empty_cache=recv_req.torch_empty_cache):
        message += "; cached prefixes keep KV of the draft before, as requests are running"
    logger.info("slime_spec plug-in: %s", message)
    return answer(success=True, message=message)


def refusal(updater: Any, updates: DraftSafeUpdates) -> str:
    """What is in a push's way before anything is read: in words, the same on all ranks; empty where nothing is.

    A session that the plug-in opened for the target's buckets is closed: an MTP head is begun and ended with it, too.
    """
    updates.session.close(updater, "a push of the draft")
    if getattr(updater, "_session", None) is not None:  # up to 0.5.20 there is none
        return "a client's session of weight updates is open: end it first"
    problem = ""
    try:
        importlib.import_module("rollout.sglang_engine.plugin.new_draft")
    except ImportError as error:
        problem = f"the servers' environment lacks what a push needs: {error}"
    return "; ".join(told_by_all(problem, updater.tp_cpu_group))


def refused(message: str) -> str:
    COUNTS["refused"] += 1
    logger.error("slime_spec plug-in: a push of the draft was refused: %s", message)
    return message


def loader_of(runner: Any) -> Any:
    return runner.weight_updater


def runner_itself(runner: Any) -> Any:
    return runner


LOAD = ("self", "named_tensors", "load_format")
BEGUN_AND_ENDED = Layout(
    loader_of,
    True,
    (
        Name(f"{RUNNER_UPDATER}.update_weights_from_tensor", LOAD),
        Name(f"{RUNNER_UPDATER}.begin_weight_update", ("self",)),
        Name(f"{RUNNER_UPDATER}.end_weight_update", ("self", "run_post_load")),
        Name(UPDATER, members=("_session",)),
        RUNNERS,
    ),
)
OF_AN_UPDATER = Layout(loader_of, False, (Name(f"{RUNNER_UPDATER}.update_weights_from_tensor", LOAD),))
OF_THE_RUNNER = Layout(runner_itself, False, (Name(f"{RUNNER}.update_weights_from_tensor", LOAD),))


def used(layout: Layout) -> tuple[tuple[Hook, ...], tuple[Name, ...]]:
    """The hooks of a layout's contract, and its other names."""
    update = Name(f"{UPDATER}.update_weights_from_tensor", ("self", "recv_req"))
    request = ("serialized_named_tensors", "load_format", "flush_cache", "torch_empty_cache")
    needs = (
        Name(UPDATER, members=("tp_worker", "draft_worker", "tp_cpu_group", "flush_cache", "offload_tags")),
        Name(f"{MESSAGES}.UpdateWeightsFromTensorReqInput", members=request),
        Name(f"{MESSAGES}.UpdateWeightsFromTensorReqOutput", members=("success", "message")),
        Name("sglang.srt.utils.common.MultiprocessingSerializer.deserialize", ("data",)),
        Name("sglang.srt.utils.patch_torch.monkey_patch_torch_reductions"),
        Name("sglang.srt.configs.model_config.ModelConfig", attributes=("model_path", "quantization")),
        ALGORITHM,
        *layout.needs,
    )
    return (Hook(update, "around", "scheduler", partial(push, layout)),), needs


STATE.details[NAME] = Detail("scheduler", lambda: COUNTS)
FEATURE = Feature(
    NAME,
    "replaces the draft's weights alone, whole or not at all",
    (
        Contract("0.5.21 to 0.5.23", *used(BEGUN_AND_ENDED)),
        Contract("0.5.16 to 0.5.20", *used(OF_AN_UPDATER)),
        Contract("0.5.15", *used(OF_THE_RUNNER)),
    ),
)
