"""Calls SGLang's own updater of weights, with the plug-in's hooks, on stand-ins for models; tells what each loaded.

    python hooked_updater.py /target /draft      paths of the two checkpoints; an MTP head's is the target's

There is one line per update: its origin, whether it succeeded, and the calls in their order.
"""

import json
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from sglang.srt.managers import io_struct
from sglang.srt.managers.scheduler_components import weight_updater
from sglang.srt.plugins import load_plugins

HAS_SESSIONS = hasattr(io_struct, "BeginWeightUpdateReqInput")
WEIGHTS = [("embed", 1)]
CALLS: list[str] = []


class Runner:
    """A model runner and all that SGLang reaches through it, of which each call is noted."""

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.model = self.weight_updater = self
        self.model_runner = self
        self.model_config = SimpleNamespace(model_path=path)
        yes, no = (lambda: True), (lambda: False)
        self.spec_algorithm = SimpleNamespace(is_standalone=no, is_eagle=yes, is_eagle3=no, is_ngram=no)

    def note(self, what: str) -> tuple[bool, str]:
        CALLS.append(f"{self.name} {what}")
        return True, ""

    def load_weights(self, weights: Any) -> None:
        self.note("loads")

    def begin_weight_update(self) -> None:
        self.note("begins")

    def end_weight_update(self, run_post_load: bool) -> None:
        self.note("ends")

    def update_weights_from_disk(self, *_: Any, **__: Any) -> tuple[bool, str]:
        return self.note("reads the folder")

    def update_weights_from_ipc(self, *_: Any, **__: Any) -> tuple[bool, str]:
        return self.note("opens the handles")

    def update_weights_from_tensor(self, *_: Any, **__: Any) -> tuple[bool, str]:
        self.model.load_weights(WEIGHTS)
        return True, ""

    update_weights_from_distributed = load_weights_from_distributed = update_weights_from_tensor

    def receive_weights_from_distributed(self, **_: Any) -> Any:
        return WEIGHTS

    def deserialize_own_rank(self, serialized: Any) -> Any:
        return WEIGHTS

    def weight_update_runners(self) -> list[tuple[str, "Runner"]]:
        return [("target", self)]


class DraftWorker:
    def __init__(self, target: Runner, draft: Runner) -> None:
        self.target, self.draft, self.draft_worker = target, draft, SimpleNamespace(draft_runners=[draft])
        self.update_weights_from_disk, self.update_weights_from_ipc = (
            draft.update_weights_from_disk,
            draft.update_weights_from_ipc,
        )
        if HAS_SESSIONS:
            self.weight_update_runners = lambda: [("draft", draft)]

    def update_weights_from_tensor(self, request: Any) -> tuple[bool, str]:
        self.draft.update_weights_from_tensor()
        return self.target.update_weights_from_tensor()


def make_updater(target: Runner, draft: Runner) -> Any:
    group = dist.group.WORLD
    weight_updater.get_parallel = lambda: SimpleNamespace(tp_group=SimpleNamespace(cpu_group=group))
    fields: dict[str, Any] = {
        "tp_worker": target,
        "draft_worker": DraftWorker(target, draft),
        "memory_saver_adapter": None,
        "flush_cache": lambda **_: True,
        "is_fully_idle": lambda **_: True,
        "scheduler": SimpleNamespace(record_weight_version_change=lambda **_: None),
    }
    made_of = weight_updater.SchedulerWeightUpdaterManager.__dataclass_fields__
    if made_of["tp_cpu_group"].init:
        fields["tp_cpu_group"] = group
    return weight_updater.SchedulerWeightUpdaterManager(**fields)


def main(target_path: str, draft_path: str) -> None:
    load_plugins()
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
    updater = make_updater(Runner("target", target_path), Runner("draft", draft_path))
    requests = {
        "tensor": io_struct.UpdateWeightsFromTensorReqInput(serialized_named_tensors=[b""], flush_cache=False),
        "distributed": io_struct.UpdateWeightsFromDistributedReqInput(
            names=[], dtypes=[], shapes=[], flush_cache=False
        ),
        "disk": io_struct.UpdateWeightFromDiskReqInput(model_path="/new"),
        "ipc": io_struct.UpdateWeightsFromIPCReqInput(zmq_handles={}),
    }
    for origin, request in requests.items():
        output = getattr(updater, f"update_weights_from_{origin}")(request)
        sys.stdout.write(json.dumps([origin, output.success, CALLS]) + "\n")
        CALLS.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
