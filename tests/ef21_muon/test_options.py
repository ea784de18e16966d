"""Options of EF21Muon in one process: starts, feedback, radii, decay, and its diagnostics."""

import numpy as np
import pytest
import reference
import torch

from ef21_muon import EF21Muon
from ef21_muon.compressors import Identity, RankK, TopK
from ef21_muon.norms import AdaptiveRadius, Sign, Spectral

SHAPES = {"query": (12, 20), "key": (12, 20), "head": (9, 14)}
FRACTION = 0.2
TOP = reference.top_k(FRACTION, reference.float32)


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def build(**options):
    parameters = {name: torch.nn.Parameter(x) for name, x in tensors(0).items()}
    return parameters, EF21Muon(parameters.items(), **options)


def step(parameters, optimizer, seed):
    """One round with random gradients; returns them in float64."""
    gradients = tensors(seed)
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]
    optimizer.step()
    return {name: gradient.double().numpy() for name, gradient in gradients.items()}


def state(parameters, optimizer, key):
    return {
        name: optimizer.state[parameter][key].double().numpy().copy()
        for name, parameter in parameters.items()
    }


def values(parameters):
    return {name: p.detach().double().numpy().copy() for name, p in parameters.items()}


def assert_close(found, expected, tolerance=1e-5):
    for name in SHAPES:
        error = np.linalg.norm(found[name] - expected[name])
        assert error <= tolerance * np.linalg.norm(expected[name]), name


@pytest.mark.parametrize(
    ("feedback", "gradient_of"),
    [
        ("ef21", lambda error, message: error + message),
        ("ef14", lambda error, message: message),
        ("none", lambda error, message: message),
    ],
)
def test_feedback_follows_its_recursion(feedback, gradient_of):
    """The server's gradient after every round, against each method's own recursion."""
    beta = 0.3
    parameters, optimizer = build(momentum=1 - beta, w2s=TopK(FRACTION), feedback=feedback)
    errors = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    momentum = None
    for seed in range(1, 8):
        gradients = step(parameters, optimizer, seed)
        old = momentum or gradients
        momentum = {n: (1 - beta) * old[n] + beta * gradients[n] for n in SHAPES}
        expected = {}
        for name in SHAPES:
            target = {
                "ef21": momentum[name] - errors[name],
                "ef14": momentum[name] + errors[name],
                "none": momentum[name],
            }[feedback]
            message = TOP(target, None)
            expected[name] = gradient_of(errors[name], message)
            errors[name] = expected[name] if feedback == "ef21" else target - message
        assert_close(state(parameters, optimizer, "server_gradient"), expected)


@pytest.mark.parametrize(
    ("feedback", "decay", "server_momentum"),
    [("ef14", 0.9, 0.7), ("ef14", 0.0, 0.5), ("ef14", 0.8, 0.0), ("none", 1.0, 0.6)],
)
def test_errors_decay_and_the_server_averages(feedback, decay, server_momentum):
    """e' = (decay e + M) - R and G' = server_momentum G + R, M_j and W from the state."""
    parameters, optimizer = build(
        momentum=0.7,
        w2s=TopK(FRACTION),
        feedback=feedback,
        error_decay=decay,
        server_momentum=server_momentum,
    )
    unsent = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    served = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for seed in range(1, 8):
        step(parameters, optimizer, seed)
        momentum = state(parameters, optimizer, "momentum")
        for name in SHAPES:
            target = momentum[name] + decay * unsent[name]
            message = TOP(target, None)
            unsent[name] = target - message if feedback == "ef14" else unsent[name]
            served[name] = server_momentum * served[name] + message
        assert_close(state(parameters, optimizer, "server_gradient"), served)


def errors_of_one_gradient(decay, compressor, rounds=60):
    """||e||^2 / ||grad||^2 by layer, the same gradient in all rounds."""
    parameters, optimizer = build(momentum=0, w2s=compressor, feedback="ef14", error_decay=decay)
    for _ in range(rounds):
        gradients = step(parameters, optimizer, seed=1)
    errors = state(parameters, optimizer, "gradient_estimate")
    return {n: np.square(errors[n]).sum() / np.square(gradients[n]).sum() for n in SHAPES}


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_a_decaying_error_is_bounded_by_the_gradients(decay):
    """By convexity ||e'||^2 <= (1 - alpha) (||grad||^2 / (1 - decay) + decay ||e||^2)."""
    compressor = TopK(0.01)
    found = errors_of_one_gradient(decay, compressor)
    without = errors_of_one_gradient(1.0, compressor)
    for name, shape in SHAPES.items():
        lost = 1 - compressor.alpha(*shape)
        bound = lost / ((1 - decay) * (1 - lost * decay))
        assert bound / 3 < found[name] <= bound < without[name]


def test_feedback_variants_part_after_the_first_round():
    models = {}
    for feedback in ("ef21", "ef14", "none"):
        parameters, optimizer = build(w2s=TopK(FRACTION), feedback=feedback)
        models[feedback] = []
        for seed in (1, 2):
            step(parameters, optimizer, seed)
            models[feedback].append(values(parameters)["query"])
    for one, other in (("ef21", "ef14"), ("ef21", "none"), ("ef14", "none")):
        np.testing.assert_array_equal(models[one][0], models[other][0])
        assert np.abs(models[one][1] - models[other][1]).max() > 1e-3


@pytest.mark.parametrize("start", ["gradient", "zero"])
def test_momentum_starts_as_asked(start):
    parameters, optimizer = build(momentum=0.75, momentum_init=start)
    first = step(parameters, optimizer, 1)
    second = step(parameters, optimizer, 2)
    weight = {"gradient": 1.0, "zero": 0.25}[start]
    expected = {n: 0.75 * weight * first[n] + 0.25 * second[n] for n in SHAPES}
    assert_close(state(parameters, optimizer, "momentum"), expected)


def test_nesterov_sends_the_gradient_with_the_momentum():
    parameters, optimizer = build(momentum=0.75, nesterov=True)
    first = step(parameters, optimizer, 1)
    second = step(parameters, optimizer, 2)
    momentum = {n: 0.75 * first[n] + 0.25 * second[n] for n in SHAPES}
    expected = {n: 0.75 * momentum[n] + 0.25 * second[n] for n in SHAPES}
    assert_close(state(parameters, optimizer, "momentum"), momentum)
    assert_close(state(parameters, optimizer, "server_gradient"), expected)


def test_an_exact_first_message_is_the_gradient_and_is_counted():
    options = {"w2s": TopK(FRACTION), "s2w": RankK(0.1)}
    parameters, optimizer = build(first_message="full", **options)
    compressed_parameters, compressed = build(**options)
    assert (optimizer.w2s_bytes, optimizer.s2w_bytes, optimizer.wire_tx_bytes) == (0, 0, 0)
    gradients = step(parameters, optimizer, 1)
    step(compressed_parameters, compressed, 1)
    whole = 4 * sum(np.prod(shape) for shape in SHAPES.values())
    assert optimizer.w2s_bytes == whole > 3 * compressed.w2s_bytes
    for estimate in ("gradient_estimate", "server_gradient"):
        assert_close(state(parameters, optimizer, estimate), gradients, 0)
    for seed in (2, 3):
        step(parameters, optimizer, seed)
        step(compressed_parameters, compressed, seed)
    assert optimizer.w2s_bytes == whole + 2 * compressed.w2s_bytes // 3
    assert optimizer.s2w_bytes == compressed.s2w_bytes > 0


@pytest.mark.parametrize("s2w", [Identity(), TopK(1.0, "bfloat16")])
def test_weight_decay_pulls_the_servers_model_to_zero(s2w):
    lr, decay = 0.1, 0.5
    parameters, optimizer = build(lr=lr, weight_decay=decay, norm=Sign(), s2w=s2w)
    expected = values(parameters)
    for seed in (1, 2, 3):
        step(parameters, optimizer, seed)
        gradients = state(parameters, optimizer, "server_gradient")
        for name, shape in SHAPES.items():
            move = -np.sign(gradients[name]) / shape[1] - decay * expected[name]
            expected[name] = expected[name] + lr * move
    found = values(parameters)
    if not s2w.lossless:
        found = state(parameters, optimizer, "server_model")
    assert_close(found, expected)


def test_an_adaptive_radius_follows_each_layers_dual_norm():
    radius = AdaptiveRadius(l0=2.0, l1=0.5)
    parameters, optimizer = build(lr=0.1, norm=Sign(), radius=radius)
    before = values(parameters)
    gradients = step(parameters, optimizer, 1)
    expected = {}
    for name, gradient in gradients.items():
        d_in = gradient.shape[1]
        dual = np.abs(gradient).sum() / d_in
        t = dual / (2.0 + 0.5 * dual)
        expected[name] = before[name] - 0.1 * t * np.sign(gradient) / d_in
    assert_close(values(parameters), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feedback": "ef22"}, "feedback='ef22' is not allowed: choose ef21, ef14, none"),
        ({"momentum_init": "one"}, "choose gradient, zero"),
        ({"first_message": "whole"}, "choose compressed, full"),
        ({"nesterov": 1}, "nesterov=1 is not allowed: give True or False"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 is not allowed"),
        ({"error_decay": 1.1}, "error_decay=1.1 is not allowed: give a number of at least 0"),
        ({"error_decay": 0.9}, "feedback='ef21': leave it at 1, or use feedback='ef14'"),
        ({"server_momentum": 0.5}, "feedback='ef21': leave it at 0, or use feedback='ef14'"),
        ({"radius": "big"}, "give a number above 0, or an AdaptiveRadius"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def relative(error, of):
    return np.linalg.norm(error) / np.linalg.norm(of)


@pytest.mark.parametrize("feedback", ["ef21", "ef14", "none"])
def test_diagnostics_are_what_the_state_says(feedback):
    parameters, optimizer = build(w2s=TopK(FRACTION), s2w=RankK(0.1), momentum=0, feedback=feedback)
    step(parameters, optimizer, 1)
    step(parameters, optimizer, 2)
    buffer = None if feedback == "none" else state(parameters, optimizer, "gradient_estimate")
    optimizer.watch = True
    gradients = step(parameters, optimizer, 3)
    for name, found in optimizer.diagnostics().items():
        gradient = gradients[name]
        sign = {"ef21": -1, "ef14": 1, "none": 0}[feedback]
        difference = gradient + sign * buffer[name] if buffer else gradient
        message = TOP(difference, None)
        estimate = buffer[name] + message if feedback == "ef21" else message
        lost = relative(message - difference, difference) ** 2
        assert found["w2s_contraction"] == pytest.approx(1 - lost, rel=1e-4)
        assert found["w2s_contraction"] >= FRACTION
        assert found["estimator_error"] == pytest.approx(
            relative(estimate - gradient, gradient), rel=1e-4
        )
        server_model = state(parameters, optimizer, "server_model")[name]
        apart = relative(server_model - values(parameters)[name], server_model)
        assert found["model_shift_error"] == pytest.approx(apart, rel=1e-4)
        assert apart > 1e-3


def test_without_compression_diagnostics_find_no_error():
    parameters, optimizer = build(norm=Spectral())
    optimizer.watch = True
    step(parameters, optimizer, 1)
    for found in optimizer.diagnostics().values():
        assert found == {"w2s_contraction": 1, "estimator_error": 0, "model_shift_error": 0}


def test_diagnostics_of_a_step_that_was_not_watched_are_refused():
    parameters, optimizer = build()
    optimizer.watch = True
    step(parameters, optimizer, 1)
    optimizer.watch = False
    step(parameters, optimizer, 2)
    with pytest.raises(RuntimeError, match="set watch=True before the step"):
        optimizer.diagnostics()
