"""How much there is to read of a step: calls, files, classes, and timers that nobody reads."""

import copy
import gc
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from one_layer import layer, take_steps

import ef21_muon
from ef21_muon import ALONE, AveragedGradients, EF21Muon, LocalSteps
from ef21_muon.compressors import TopK

LIBRARY = str(Path(ef21_muon.__file__).parent)


@pytest.mark.parametrize("method", [EF21Muon, LocalSteps, AveragedGradients])
def test_a_method_is_two_classes_below_torchs_optimizer_at_most(method):
    assert method.__mro__.index(torch.optim.Optimizer) <= 2


def calls_of(run) -> Counter:
    """The calls of functions of the library, by file and name; none of collected optimizers."""
    calls = Counter()

    def count(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(LIBRARY):
            calls[code.co_filename, code.co_qualname] += 1

    before = sys.getprofile()
    gc.collect()
    gc.disable()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
        gc.enable()
    return calls


def test_a_step_is_few_calls_in_few_files():
    """Of two layers on one worker, with messages both ways."""
    torch.manual_seed(0)
    layers = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2)]
    optimizer = EF21Muon(layers, w2s=TopK(0.3), s2w=TopK(0.5))

    def take(step):
        for parameter in layers:
            parameter.grad = torch.randn(8, 8)
        return step()

    for _ in range(3):
        take(optimizer.step)
    calls = take(lambda: calls_of(optimizer.step))
    files = {file for file, _ in calls}
    assert calls.total() <= 120, calls
    assert 1 < len(files) <= 12, files


def test_the_time_of_an_inner_optimizer_is_the_outer_ones():
    """Also in copies, and after a state was loaded."""
    model = layer()
    inner = EF21Muon(list(model.parameters()), process_group=ALONE)
    optimizer = LocalSteps(inner, sync_every=2)
    copied = copy.deepcopy((model, optimizer))
    loaded = copy.deepcopy((model, optimizer))
    loaded[1].load_state_dict(optimizer.state_dict())
    for of, one in ((model, optimizer), copied, loaded):
        take_steps(of, one, 4)
        assert one.inner[0].timer.read() == {}
        assert {"encode", "exchange", "server", "decode"} <= one.timer.read().keys()
    alone = layer()
    inner = EF21Muon(list(alone.parameters()))
    take_steps(alone, inner, 1)
    assert "server" in inner.timer.read()
