"""Methods that EF21-Muon contains or is next to, each written from its paper, in NumPy and float64.

A model is a dict of layers, (m, n) arrays. `gradient(model, step)` is the mean gradient of all
workers, `gradients(model, step)` is the list of theirs, as dicts of layers. Every method yields its
model after each step.
"""

from itertools import count

import numpy as np


def scion(model, gradient, lmos, radii, lr, weight, constrained):
    """uSCG and SCG of arXiv:2502.07529, Algorithms 1 and 2; its code starts d at zero.

    d <- (1 - a) d + a grad; x <- x + lr lmo(d), or x <- (1 - lr) x + lr lmo(d).
    """
    average = {name: np.zeros_like(layer) for name, layer in model.items()}
    for step in count():
        new = gradient(model, step)
        for name, layer in model.items():
            average[name] = (1 - weight) * average[name] + weight * new[name]
            extreme = radii[name] * lmos[name](average[name])
            kept = 1 - lr if constrained else 1
            model = model | {name: kept * layer + lr * extreme}
        yield model


def gluon(model, gradient, lmos, duals, l0, l1, weight):
    """Gluon, arXiv:2505.13416, with the adaptive step t_i = ||M_i||_* / (L0 + L1 ||M_i||_*)."""
    momentum = None
    for step in count():
        new = gradient(model, step)
        momentum = momentum or new
        for name, layer in model.items():
            momentum = momentum | {name: (1 - weight) * momentum[name] + weight * new[name]}
            dual = duals[name](momentum[name])
            model = model | {name: layer + dual / (l0 + l1 * dual) * lmos[name](momentum[name])}
        yield model


def ef21(model, gradients, compress, gamma):
    """EF21, arXiv:2106.05203, Algorithm 2: g_i <- g_i + C(grad_i - g_i), x <- x - gamma mean g_i.

    It starts from g_i = C(grad_i(x^0)).
    """
    estimates = None
    for step in count():
        new = gradients(model, step)
        estimates = estimates or [{name: 0 for name in model} for _ in new]
        for i, (estimate, target) in enumerate(zip(estimates, new, strict=True)):
            estimates[i] = {
                name: estimate[name] + compress(target[name] - estimate[name]) for name in model
            }
        model = descend(model, estimates, gamma)
        yield model


def ef21_sgdm(model, gradients, compress, gamma, eta):
    """EF21-SGDM, arXiv:2305.15155, Algorithm 1, from v_i = g_i = grad_i(x^0).

    x <- x - gamma mean g_i; v_i <- (1 - eta) v_i + eta grad_i; g_i <- g_i + C(v_i - g_i).
    """
    momenta = gradients(model, 0)
    estimates = list(momenta)
    for step in count(1):
        model = descend(model, estimates, gamma)
        yield model
        for i, new in enumerate(gradients(model, step)):
            momenta[i] = {n: (1 - eta) * momenta[i][n] + eta * new[n] for n in model}
            estimates[i] = {
                n: estimates[i][n] + compress(momenta[i][n] - estimates[i][n]) for n in model
            }


def ef21_p(model, gradients, compress, gamma):
    """EF21-P, arXiv:2209.15218: x <- x - gamma mean grad_i(w); w <- w + C(x - w). Yields w, x."""
    shift = model
    for step in count():
        model = descend(model, gradients(shift, step), gamma)
        shift = {name: shift[name] + compress(model[name] - shift[name]) for name in model}
        yield shift, model


def sign_muon(model, gradients, lmos, lr, weight, feedback):
    """SignMuon and EF21-SignMuon of arXiv:2607.29674, with a mean for the vote.

    m_i <- (1 - a) m_i + a grad_i; d_i = lmo(m_i), or d_i = lmo(m_i) - g_i with feedback;
    s_i = mean |d_i| sign(d_i); x <- x + lr mean s_i, or g_i <- g_i + s_i and x <- x + lr mean g_i.
    """
    momenta = known = None
    for step in count():
        new = gradients(model, step)
        momenta = momenta or new
        known = known or [dict.fromkeys(model, 0.0) for _ in new]
        for i, gradient in enumerate(new):
            momenta[i] = {n: (1 - weight) * momenta[i][n] + weight * gradient[n] for n in model}
            before = known[i] if feedback else dict.fromkeys(model, 0.0)
            wanted = {name: lmos[name](momenta[i][name]) - before[name] for name in model}
            known[i] = {
                name: before[name] + np.abs(d).mean() * np.sign(d) for name, d in wanted.items()
            }
        model = descend(model, known, -lr)
        yield model


def descend(model, directions, gamma):
    """x - gamma mean of the workers' directions."""
    return {
        name: layer - gamma * sum(direction[name] for direction in directions) / len(directions)
        for name, layer in model.items()
    }
