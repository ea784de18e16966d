"""Steps by hand: W far behind X, gradients that are not finite, and messages that come late."""

import copy

import pytest
import torch
from one_worker import build, set_gradients
from torch.nn import Parameter

from ef21_muon import AveragedGradients, LocalSteps
from ef21_muon.compressors import TopK
from ef21_muon.inner import beginner
from ef21_muon.norms import Sign


def test_weight_decay_is_of_x_though_w_is_far_behind():
    lr, decay = 0.1, 0.5
    options = {"lr": lr, "weight_decay": decay, "norm": Sign("none"), "s2w": TopK(0.05)}
    parameters, optimizer = build(shapes=("query", "key"), **options)
    for seed in range(1, 4):
        before = {p: optimizer.state[p]["server_model"].clone() for p in parameters.values()}
        set_gradients(parameters, seed)
        optimizer.step()
        for parameter, model in before.items():
            own = optimizer.state[parameter]
            expected = (1 - lr * decay) * model - lr * own["server_gradient"].sign()
            torch.testing.assert_close(own["server_model"], expected)
    behind = [model - p.detach().view_as(model) for p, model in before.items()]
    assert max(one.abs().max() for one in behind) > 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_layer_whose_gradient_is_not_finite_stands_still_and_others_go_on(value):
    parameters, optimizer = build(norm=Sign())
    set_gradients(parameters, seed=1)
    parameters["query"].grad[0, 0] = value
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.step()
    stands = {
        name for name, parameter in parameters.items() if torch.equal(parameter, before[name])
    }
    assert stands == {"query"}


def late(sync_every=4, sync_delay=1, outer_lr=0.5, **options):
    """Two entries, a step of whose inner optimizer is minus the gradient, and local steps."""
    parameter = Parameter(torch.zeros(1, 2))
    inner = torch.optim.SGD([parameter], lr=1.0)
    options |= {"sync_every": sync_every, "sync_delay": sync_delay, "outer_lr": outer_lr}
    return parameter, LocalSteps(inner, **options)


def take(parameter, optimizer, *gradients):
    for gradient in gradients:
        parameter.grad = torch.tensor([[gradient, 2 * gradient]])
        optimizer.step()


def test_a_late_message_takes_the_place_of_the_steps_that_it_is_of():
    """After four steps W - x_j is 4; half of it arrives with the fifth, which x_j keeps."""
    parameter, optimizer = late()
    take(parameter, optimizer, *4 * [1.0])
    assert parameter.tolist() == [[-4, -8]]
    take(parameter, optimizer, 1.0)
    assert parameter.tolist() == [[-2 - 1, -4 - 2]]
    with optimizer.global_params():
        assert parameter.tolist() == [[-2, -4]]


def test_at_the_end_a_message_under_way_arrives_and_nothing_is_unsent():
    parameter, optimizer = late()
    take(parameter, optimizer, *4 * [1.0])
    assert (optimizer.unsent.steps, len(optimizer.under_way)) == (4, 1)
    optimizer.final_sync()
    assert (optimizer.unsent.steps, optimizer.under_way) == (0, [])
    with optimizer.global_params():
        assert parameter.tolist() == [[-2, -4]]


def test_at_the_end_of_a_whole_round_what_its_message_left_out_is_not_sent():
    parameter, optimizer = late(sync_every=2, sync_delay=0, outer_lr=1.0, w2s=TopK(0.5))
    take(parameter, optimizer, *2 * [1.0])
    optimizer.final_sync()
    with optimizer.global_params():
        assert parameter.tolist() == [[0, -4]]


def test_what_is_under_way_when_a_state_is_loaded_does_not_arrive():
    """But the message that the state holds."""
    parameter, optimizer = late(sync_delay=2)
    take(parameter, optimizer, *5 * [1.0])
    saved = parameter.detach().clone(), copy.deepcopy(optimizer.state_dict())
    take(parameter, optimizer, 1.0)
    expected = parameter.detach().clone()
    take(parameter, optimizer, *3 * [5.0])  # with the second of which a message leaves
    with torch.no_grad():
        parameter.copy_(saved[0])
    optimizer.load_state_dict(saved[1])
    take(parameter, optimizer, 1.0)
    assert torch.equal(parameter, expected)


def test_a_message_that_is_sent_again_after_a_restart_counts_once():
    parameter, optimizer = late(sync_delay=2)
    take(parameter, optimizer, *5 * [1.0])
    other_parameter, other = late(sync_delay=2)
    with torch.no_grad():
        other_parameter.copy_(parameter)
    other.load_state_dict(optimizer.state_dict())
    assert other.w2s_bytes == 8
    take(other_parameter, other, 1.0)  # with which it arrives
    assert (other.w2s_bytes, other.under_way) == (8, [])


def test_streaming_sends_a_bucket_when_its_bytes_are_due():
    """Of 4 steps, the first third of the bytes after 4/3 steps, which is in the second one."""
    sizes = [5, 10]
    layers = [Parameter(torch.zeros(1, size)) for size in sizes]
    optimizer = LocalSteps(torch.optim.SGD(layers, lr=1.0), sync_every=4, streaming=True)
    schedule = optimizer.schedule
    assert [sum(b.up.size for b in bucket) for bucket in schedule.buckets] == [20, 40]
    assert [schedule.due(step) for step in range(4)] == [[], [0], [], [1]]


def test_an_optimizer_that_begins_anew_keeps_the_lr_of_its_schedule():
    inner = torch.optim.SGD([Parameter(torch.zeros(2))], lr=0.1)
    begin_anew = beginner(inner)
    inner.param_groups[0]["lr"] = 0.05
    begin_anew()
    assert inner.param_groups[0]["lr"] == 0.05


def test_a_worker_that_adopts_a_state_forgets_what_its_lost_messages_were_short_of():
    pytest.importorskip("torchft")
    from ef21_muon.fleet import Fleet

    fleet = Fleet(0, "http://localhost:1")
    inner = torch.optim.SGD([Parameter(torch.zeros(4, 8))], lr=0.1)
    optimizer = LocalSteps(inner, sync_every=2, w2s=TopK(0.2), transport=fleet)
    optimizer.batches[0].up.buffer.fill_(1.0)
    fleet.shared.adopt(fleet.shared.state())
    assert not optimizer.batches[0].up.buffer.any()


@pytest.mark.parametrize("options", [{}, {"w2s": "natural:nearest", "feedback": "none"}])
def test_averaged_gradients_are_of_their_step_alone(options):
    parameter = Parameter(torch.zeros(2))
    optimizer = AveragedGradients(torch.optim.SGD([parameter], lr=1.0), **options)
    for gradient in (1.0, 2.0, 4.0):
        parameter.grad = torch.full((2,), gradient)
        optimizer.step()
    assert parameter.tolist() == [-7.0, -7.0]


def test_bytes_go_on_from_those_of_a_loaded_state():
    parameters, optimizer = build(shapes=("query", "key"), w2s=TopK(0.5))
    others, other = build(shapes=("query", "key"), w2s=TopK(0.5))
    set_gradients(parameters, seed=1)
    optimizer.step()
    sent = optimizer.w2s_bytes
    other.load_state_dict(optimizer.state_dict())
    set_gradients(others, seed=2)
    other.step()
    assert sent > 0 and other.w2s_bytes == 2 * sent
