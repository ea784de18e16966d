"""How pytest-xdist shares test files out: launches of processes from one end of the list."""

from xdist.scheduler import LoadFileScheduling


class BothEnds(LoadFileScheduling):
    """The first process takes files from the front, the others take them from the back.

    With those in front that launch processes (conftest.py sorts them so), one launch of several
    ranks runs at a time, for as long as there is anything else to do.
    """

    def _assign_work_unit(self, node):
        if node is not self.nodes[0]:
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)
