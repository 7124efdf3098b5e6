"""Stand-ins for SGLang's updater of weights, of both contracts, with the order of calls of 0.5.20 and 0.5.21.

A model keeps what it loaded; a draft with a smaller vocabulary dies of the target's embedding, as SGLang's does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from rollout.sglang_engine.plugin.hooks import Contract

MESSAGES = SimpleNamespace(
    BeginWeightUpdateReqInput=lambda selector="all": SimpleNamespace(selector=selector, rid=None),
    EndWeightUpdateReqInput=lambda rid=None: SimpleNamespace(rid=rid),
    EndWeightUpdateReqOutput=lambda success, message: SimpleNamespace(success=success, message=message),
)
Tensors = list[tuple[str, int]]


class Model:
    """Loads the names that it has."""

    def __init__(self, *names: str, dies: bool = False) -> None:
        self.weights = dict.fromkeys(names, 0)
        self._dies = dies

    def load_weights(self, weights: Any) -> None:
        assert not self._dies, "self.org_vocab_size=61 loaded_weight.shape[output_dim]=257"
        self.weights.update({name: value for name, value in weights if name in self.weights})


class Runner:
    """One model; a folder's path is the checkpoint's, as long as nothing was loaded from another."""

    def __init__(self, model: Model, path: str, algorithm: str = "EAGLE") -> None:
        self.model = model
        self.model_config = SimpleNamespace(model_path=path)
        self.spec_algorithm = SimpleNamespace(
            is_standalone=lambda: algorithm == "STANDALONE",
            is_eagle=lambda: algorithm in ("EAGLE", "EAGLE3"),
            is_eagle3=lambda: algorithm == "EAGLE3",
            is_ngram=lambda: algorithm == "NGRAM",
        )
        self.calls: list[str] = []
        self.weight_updater = self

    def load(self, weights: Tensors) -> None:
        self.model.load_weights(weights)

    def from_disk(self, request: Any) -> None:
        self.model_config.model_path = request.model_path
        self.load(request.weights)

    def begin_weight_update(self) -> None:
        self.calls.append("begin")

    def end_weight_update(self) -> None:
        self.calls.append("end")


class DraftWorker:
    """The draft's worker of 0.5.20 and of 0.5.21, where ``draft_worker`` holds the runners."""

    def __init__(self, target: Runner, *runners: Runner) -> None:
        self._target, self.draft_worker = target, SimpleNamespace(draft_runners=list(runners))

    def update_weights_from_tensor(self, request: Any) -> None:
        self.draft_worker.draft_runners[0].load(request.weights)
        self._target.load(request.weights)

    def update_weights_from_disk(self, request: Any) -> None:
        for runner in self.draft_worker.draft_runners:
            runner.from_disk(request)


class SeveralLayers:
    """An MTP head of several layers, for which 0.5.20 has no updates from tensors."""

    def __init__(self, *runners: Runner) -> None:
        self.draft_worker = SimpleNamespace(draft_runner_list=list(runners))


class RenamedDraftWorker(DraftWorker):
    """The draft's worker of a release that has its runners under a name of its own; updates reach them as before."""

    def __init__(self, target: Runner, *runners: Runner) -> None:
        super().__init__(target, *runners)
        self._drafting = self.draft_worker
        del self.draft_worker

    def update_weights_from_tensor(self, request: Any) -> None:
        self._drafting.draft_runners[0].load(request.weights)
        self._target.load(request.weights)


class NewerDraftWorker(DraftWorker):
    def weight_update_runners(self) -> list[tuple[str, Runner]]:
        return [("draft", runner) for runner in self.draft_worker.draft_runners]


def done(success: bool = True) -> Any:
    return SimpleNamespace(success=success, message="")


class Older:
    """The updater up to 0.5.20."""

    def __init__(self, target: Runner, draft_worker: Any) -> None:
        self.tp_worker = SimpleNamespace(model_runner=target)
        self.draft_worker = draft_worker

    def update_weights_from_tensor(self, recv_req: Any) -> Any:
        if recv_req.disable_draft_model or not self.draft_worker:
            self.tp_worker.model_runner.load(recv_req.weights)
        else:
            self.draft_worker.update_weights_from_tensor(recv_req)
        return done()

    def update_weights_from_distributed(self, recv_req: Any) -> Any:
        self.tp_worker.model_runner.load(recv_req.weights)
        return done()

    def update_weights_from_disk(self, recv_req: Any) -> Any:
        self.tp_worker.model_runner.from_disk(recv_req)
        if self.draft_worker is not None:
            self.draft_worker.update_weights_from_disk(recv_req)
        return done()

    update_weights_from_ipc = update_weights_from_disk


class Newer:
    """The updater from 0.5.21 on, which loads on its own rank and begins and ends with all ranks of its group."""

    def __init__(self, target: Runner, draft_worker: Any, tp_cpu_group: Any = None) -> None:
        self.tp_cpu_group = tp_cpu_group
        self.tp_worker = SimpleNamespace(model_runner=target)
        self.draft_worker = draft_worker
        self._session: str | None = None
        self.fails = False

    def _runners(self, selector: str = "all") -> list[Runner]:
        target = [self.tp_worker.model_runner] if selector in ("all", "target") else []
        if selector == "target" or self.draft_worker is None:
            return target
        return target + [runner for _, runner in self.draft_worker.weight_update_runners()]

    def begin_weight_update(self, recv_req: Any) -> Any:
        if self._session is not None:
            return done(False)
        for runner in self._runners(recv_req.selector):
            runner.begin_weight_update()
        self._session = recv_req.selector
        self._barrier()
        return done()

    def end_weight_update(self, recv_req: Any) -> Any:
        if self._session is None:
            return done(False)
        for runner in self._runners(self._session):
            runner.end_weight_update()
        self._session = None
        self._barrier()
        return done()

    def _barrier(self) -> None:
        if self.tp_cpu_group is not None:
            torch.distributed.barrier(group=self.tp_cpu_group)

    def update_weights_from_tensor(self, recv_req: Any) -> Any:
        if self._session is None or self.fails:
            return SimpleNamespace(success=False, message="not loaded")
        for runner in self._runners(recv_req.selector):
            runner.load(recv_req.weights)
        return done()

    update_weights_from_distributed = update_weights_from_tensor

    def update_weights_from_disk(self, recv_req: Any) -> Any:
        for runner in self._runners():
            runner.from_disk(recv_req)
        return done()

    update_weights_from_ipc = update_weights_from_disk

    def release_memory_occupation(self, recv_req: Any) -> Any:
        return done()


class Scheduler:
    def __init__(self, updater: Any) -> None:
        self.weight_updater, self._engine_paused = updater, False

    def continue_generation(self, recv_req: Any) -> None:
        self._engine_paused = False

    def flush_cache(self, empty_cache: bool = True) -> bool:
        return True

    def handle_generate_request(self, recv_req: Any, *, mm_input_error: str | None = None) -> None: ...


@dataclass
class Hooked:
    """Calls methods of stand-ins as SGLang's registry does where a contract's hooks are applied."""

    contract: Contract
    objects: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, instance: Any) -> Any:
        """Wraps the methods of an object that stands for a class of SGLang's."""
        for hook in self.contract.hooks:
            owner, _, method = hook.name.target.rpartition(".")
            if owner.rpartition(".")[2] == name:
                setattr(instance, method, self._wrapped(hook.kind, hook.function, getattr(instance, method), instance))
        return instance

    def _wrapped(self, kind: str, function: Callable[..., Any], bound: Any, instance: Any) -> Callable[..., Any]:
        original = bound.__func__

        def around(*args: Any, **kwargs: Any) -> Any:
            return function(original, instance, *args, **kwargs)

        def before(*args: Any, **kwargs: Any) -> Any:
            changed = function(instance, *args, **kwargs)
            assert changed is None, "no hook changes arguments"
            return original(instance, *args, **kwargs)

        return {"around": around, "before": before}[kind]
