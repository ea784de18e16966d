"""Dion (arXiv:2504.05295) and DeMo (arXiv:2411.19870) in NumPy and float64.

Written from the papers for the tests, with nothing of baselines: one process plays all workers. A
model is a dict of (m, n) arrays, gradients[j] that of worker j. `rounding` maps an array to what
its payload says (`reference`).
"""

import numpy as np


def gram_schmidt(columns):
    """An orthonormal basis of the columns' span, twice over for its accuracy."""
    for _ in range(2):
        basis = []
        for column in columns.T:
            for vector in basis:
                column = column - vector * (vector @ column)
            basis.append(column / np.linalg.norm(column))
        columns = np.stack(basis, axis=1)
    return columns


class Dion:
    """Algorithm 1 of Dion with a momentum M_j for each worker, and Lion for the layers in `lion`.

    right_factors: Q at the start of every layer that is not Lion's. averaged: layers of which all
    workers have the mean gradient, so that they send no factors. lion_lr: by layer.
    """

    def __init__(self, model, right_factors, averaged, lion, workers, mu, betas, rounding):
        self.model = {name: layer.astype(np.float64) for name, layer in model.items()}
        self.right_factors = {name: q.astype(np.float64) for name, q in right_factors.items()}
        self.momentum = [
            {name: np.zeros(layer.shape) for name, layer in model.items()} for _ in range(workers)
        ]
        self.averaged, self.lion = averaged, lion
        self.mu, self.betas, self.rounding = mu, betas, rounding

    def step(self, gradients, lr, weight_decay, lion_lr):
        for name in self.model:
            of_workers = [gradient[name] for gradient in gradients]
            mean = np.mean(of_workers, axis=0)
            if name in self.lion:
                self._lion(name, mean, lion_lr[name])
            elif name in self.averaged:
                self._dion(name, [mean] * len(gradients), lr, weight_decay, lambda x: x)
            else:
                self._dion(name, of_workers, lr, weight_decay, self.rounding)

    def _dion(self, name, gradients, lr, weight_decay, rounding):
        q, x = self.right_factors[name], self.model[name]
        buffers = [m[name] + g for m, g in zip(self.momentum, gradients, strict=True)]
        x *= 1 - lr * weight_decay
        for momentum, buffer in zip(self.momentum, buffers, strict=True):
            momentum[name] = buffer
        if not np.any(buffers):
            return
        p = gram_schmidt(np.mean([rounding(buffer @ q) for buffer in buffers], axis=0))
        r = np.mean([rounding(buffer.T @ p) for buffer in buffers], axis=0)
        for momentum, buffer in zip(self.momentum, buffers, strict=True):
            error = buffer - p @ r.T
            momentum[name] = self.mu * buffer + (1 - self.mu) * error
        q = r / np.linalg.norm(r, axis=0)
        x -= lr * np.sqrt(x.shape[0] / x.shape[1]) * p @ q.T
        self.right_factors[name] = q

    def _lion(self, name, gradient, lr):
        """arXiv:2302.06675, algorithm 2; with the same gradient, momenta are equal on workers."""
        of_step, of_momentum = self.betas
        momentum = self.momentum[0][name]
        self.model[name] -= lr * np.sign(of_step * momentum + (1 - of_step) * gradient)
        for own in self.momentum:
            own[name] = of_momentum * momentum + (1 - of_momentum) * gradient


def cosines(size):
    """C with DCT-II(x) = C x, orthonormal: sums of x_j cos(pi (2 j + 1) i / (2 size))."""
    i, j = np.mgrid[:size, :size]
    scale = np.where(i == 0, np.sqrt(1 / size), np.sqrt(2 / size))
    return scale * np.cos(np.pi * (2 * j + 1) * i / (2 * size))


def tiles(shape, chunk):
    """The chunks of a matrix, as pairs of slices: sides are the largest divisors up to `chunk`."""
    sides = [max(d for d in range(1, chunk + 1) if length % d == 0) for length in shape]
    rows, columns = (
        [slice(start, start + side) for start in range(0, length, side)]
        for length, side in zip(shape, sides, strict=True)
    )
    return [(row, column) for row in rows for column in columns]


class DeMo:
    """Algorithm 1 of DeMo with the sign of Signum.

    Relative to the largest magnitude in its chunk, `gap` is the least distance so far between the
    k-th and the next coefficient, and entries of X are `settled` whose sign was never nearer to
    zero than 1e-5. (It is zero where all sent cosines are, which happens in chunks of odd sides.)
    """

    def __init__(self, model, workers, decay, k, chunk, rounding):
        self.model = {name: layer.astype(np.float64) for name, layer in model.items()}
        self.momentum = [
            {name: np.zeros(layer.shape) for name, layer in model.items()} for _ in range(workers)
        ]
        self.decay, self.k, self.chunk, self.rounding = decay, k, chunk, rounding
        self.gap = np.inf
        self.settled = {name: np.ones(layer.shape, bool) for name, layer in model.items()}

    def step(self, gradients, lr, weight_decay):
        for name, x in self.model.items():
            for momentum, gradient in zip(self.momentum, gradients, strict=True):
                momentum[name] = self.decay * momentum[name] + gradient[name]
            x *= 1 - lr * weight_decay
            for tile in tiles(x.shape, self.chunk):
                direction = self._synchronise([m[name][tile] for m in self.momentum])
                x[tile] -= lr * np.sign(direction)
                if np.any(direction):
                    near = np.abs(direction) < 1e-5 * np.abs(direction).max()
                    self.settled[name][tile] &= ~near

    def _synchronise(self, momenta):
        """The direction of one chunk; what is sent leaves `momenta`, which are views."""
        rows, columns = (cosines(side) for side in momenta[0].shape)
        messages = [self._largest(rows @ momentum @ columns.T) for momentum in momenta]
        for momentum, message in zip(momenta, messages, strict=True):
            sent = np.zeros(momentum.shape)
            for place, value in message.items():
                sent[place] = value
            momentum -= rows.T @ sent @ columns
        mean = np.zeros(momenta[0].shape)
        for place in set().union(*messages):
            mean[place] = np.mean([message[place] for message in messages if place in message])
        return rows.T @ mean @ columns

    def _largest(self, coefficients):
        """The message: values of the k largest by their place."""
        order = np.argsort(-np.abs(coefficients), axis=None)
        places = [np.unravel_index(flat, coefficients.shape) for flat in order[: self.k]]
        sorted_magnitudes = np.abs(coefficients.flat[order])
        if self.k < len(order) and sorted_magnitudes[0] > 0:
            gap = sorted_magnitudes[self.k - 1] - sorted_magnitudes[self.k]
            self.gap = min(self.gap, gap / sorted_magnitudes[0])
        values = self.rounding(np.array([coefficients[place] for place in places]))
        return dict(zip(places, values, strict=True))


class GreedyLore:
    """What GreedyLore makes of the workers' gradients of a matrix (m, n), m <= n.

    `gap` is the least distance so far, relative to the largest, between the last direction's
    estimate that was taken and the next.
    """

    def __init__(self, workers, shape, rank, refresh_every):
        self.errors = [np.zeros(shape) for _ in range(workers)]
        self.rank, self.refresh_every = rank, refresh_every
        self.basis, self.step, self.gap = None, 0, np.inf

    def average(self, gradients, probe):
        wanted = [g + e for g, e in zip(gradients, self.errors, strict=True)]
        whole, self.step = self.step % self.refresh_every == 0, self.step + 1
        if whole:
            mean = sum(wanted) / len(wanted)
            self.errors = [np.zeros(mean.shape) for _ in wanted]
            # Eigenvectors of B B^T, of falling eigenvalues.
            self.basis = np.linalg.eigh(mean @ mean.T)[1][:, ::-1]
            return mean
        energies = [
            sum((self.basis[:, i] @ x) @ probe[i] for x in wanted) ** 2 for i in range(len(probe))
        ]
        order = sorted(range(len(probe)), key=lambda i: -energies[i])
        last, next_one = (energies[order[place]] for place in (self.rank - 1, self.rank))
        self.gap = min(self.gap, (last - next_one) / energies[order[0]])
        projection = sum(np.outer(u, u) for u in self.basis.T[order[: self.rank]])
        self.errors = [x - projection @ x for x in wanted]
        return projection @ sum(wanted) / len(wanted)
