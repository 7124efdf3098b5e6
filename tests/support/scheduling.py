"""Which process runs which tests: whole files at a time, also after a process has died."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController


class WholeFiles(LoadScopeScheduling):
    """Gives whole files to whichever process is free; after a crash the other tests run, and the crashed one failed.

    LoadScopeScheduling hands a dead process's files on whole, with what has run and with the test that ended it, one at
    a time (a process that is left with one test, or none, waits for more for ever), and to processes that just start.
    """

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("::")[0]

    def remove_node(self, node: WorkerController) -> str | None:
        left = [
            (scope, nodeid)
            for scope, unit in self.assigned_work.pop(node).items()
            for nodeid, is_done in unit.items()
            if not is_done
        ]
        if not left:
            return None
        (_, crashed), *others = left
        for scope, nodeid in others:
            self.workqueue.setdefault(scope, {})[nodeid] = False
        for other in self.nodes:
            self._reschedule(other)
        return crashed

    def _reschedule(self, node: WorkerController) -> None:
        if node not in self.registered_collections:
            return  # it still looks for its tests, and is asked again when it knows them
        # A process runs a test once it knows the next one, or that there is none.
        while self.workqueue and not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
            self._assign_work_unit(node)
        super()._reschedule(node)
