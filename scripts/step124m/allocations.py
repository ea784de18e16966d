"""What torch's CPU allocator hands out, by phase of a step."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ef21_muon.checks.guards import PhaseTimer


class Phases(PhaseTimer):
    """A timer on the CPU whose phases are also marked for the profiler."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self._marks = ExitStack()

    def phase(self, name: str | None) -> None:
        self._marks.close()
        super().phase(name)
        if name:
            self._marks.enter_context(record_function(name))


@dataclass
class Memory:
    """Bytes beyond those that were allocated before, and what allocated the largest tensor."""

    peak_bytes: int = 0
    largest_bytes: int = 0
    largest_operator: str = ""


class Allocations:
    """What torch's CPU allocator hands out `with` it, by phase.

    `phases`: Memory of each; `kept`: bytes that are still allocated at the end. With `shapes` the
    profiler holds every tensor, and torch swaps none then, as to materialise a sharded model.
    """

    def __init__(self, shapes: bool = True):
        self.shapes = shapes

    def __enter__(self):
        self.profile = profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=self.shapes
        ).__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "trace.json")
            self.profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        del self.profile
        marks = [event for event in events if event.get("cat") == "user_annotation"]
        operators = [event for event in events if event.get("cat") == "cpu_op"]
        changes = [event for event in events if event["name"] == "[memory]"]
        self.phases = {mark["name"]: Memory() for mark in marks}
        live, level = {}, 0
        for change in sorted(changes, key=lambda event: event["ts"]):
            address, size = change["args"]["Addr"], change["args"]["Bytes"]
            # Of what was allocated before, the profiler may or may not know the size.
            before, level = level, level + (size if size > 0 else -live.pop(address, 0))
            if size > 0:
                live[address] = size
            for mark in enclosing(change, marks):
                memory = self.phases[mark["name"]]
                memory.peak_bytes = max(memory.peak_bytes, before, level)
                if size > memory.largest_bytes:
                    memory.largest_bytes = size
                    memory.largest_operator = caller(change, operators)
        self.kept = level


def enclosing(event: dict, others: list[dict]) -> Iterator[dict]:
    """Those of the other events during which an event happened."""
    return (o for o in others if o["ts"] <= event["ts"] <= o["ts"] + o["dur"])


def caller(event: dict, operators: list[dict]) -> str:
    """The outermost operator during which an event happened, and the shapes of its inputs."""
    outermost = max(enclosing(event, operators), key=lambda o: o["dur"], default=None)
    if outermost is None:
        return "none"
    inputs = outermost["args"].get("Input Dims", [])
    shapes = ("x".join(map(str, shape)) for shape in inputs if shape)
    return f"{outermost['name'].removeprefix('aten::')}({', '.join(shapes)})"
