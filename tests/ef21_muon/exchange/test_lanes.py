"""Lanes of a worker of one rank."""

import pytest
import torch
from ef21_muon.exchange.lanes import Lanes

from ef21_muon.guards import bring_gradients


def test_a_gradient_that_is_missing_on_a_rank_is_told_before_anything_is_sent(process_group):
    parameters = [torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(5))]
    parameters[0].grad = torch.ones(3, 4)
    lanes = Lanes(parameters, worker_size=1, timeout=None)
    with pytest.raises(RuntimeError, match=r"^a parameter of shape \(5,\) has no gradient: every"):
        bring_gradients(lanes.layers, "the optimizer")
    lanes.name([layer._replace(name=name) for layer, name in zip(lanes.layers, "ab", strict=True)])
    with pytest.raises(RuntimeError, match=r"^b has no gradient: every parameter given to the opt"):
        bring_gradients(lanes.layers, "the optimizer")
    lanes.name([layer._replace(missing="zero") for layer in lanes.layers])
    bring_gradients(lanes.layers, "the optimizer")
    assert torch.equal(parameters[1].grad, torch.zeros(5))
    lanes.reduce_gradients()
    assert torch.equal(parameters[0].grad, torch.ones(3, 4))
