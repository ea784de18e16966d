"""Algorithm 1 of arXiv:2510.00643 in NumPy and float64: one process plays server and n workers.

Written from the paper for the tests, with nothing of ef21_muon. It rounds where a payload rounds
and nowhere else. A layer is an (m, n) array, a model a dict of layers; a vector is (n, 1).

A rounding maps an array to what its payload says. A compressor maps (matrix, sketch) to C(matrix);
only `rank_k` reads the sketch, which is data.
"""

import numpy as np


def float32(x):
    return x.astype(np.float32).astype(np.float64)


def bfloat16(x):
    """The upper half of a float32, rounded to nearest, ties to even."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    halves = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return (halves << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def natural(x):
    """The nearer power of two, ties away from zero."""
    mantissa, exponent = np.frexp(x)  # |mantissa| in [1/2, 1): 3/4 is halfway
    return np.ldexp(np.sign(x), exponent - (np.abs(mantissa) < 0.75))


def quantize(rounding):
    return lambda x, sketch: rounding(x)


def top_k(fraction, rounding):
    def compress(x, sketch):
        kept = max(1, round(fraction * x.size))
        places = np.argsort(-np.abs(x), axis=None)[:kept]
        result = np.zeros(x.size)
        result[places] = rounding(x.flat[places])
        return result.reshape(x.shape)

    return compress


def rank_of(fraction, shape):
    """The rank that `rank_k` keeps, or None where the factors would be no smaller than x."""
    rank = max(1, round(fraction * min(shape)))
    return rank if rank * sum(shape) < np.prod(shape) else None


def rank_k(fraction, rounding):
    """Halko, Martinsson, Tropp (2011), algorithm 4.3 with half a power step, on the short side."""

    def compress(x, sketch):
        if rank_of(fraction, x.shape) is None:
            return rounding(x)
        short = x if x.shape[0] <= x.shape[1] else x.T
        basis, _ = np.linalg.qr(short @ short.T @ sketch)
        product = rounding(basis) @ rounding(basis.T @ short)
        return product if x.shape[0] <= x.shape[1] else product.T

    return compress


def newton_schulz(x, steps=5):
    """Jordan's quintic iteration towards the polar factor, after Frobenius normalisation."""
    x = x / (np.linalg.norm(x) or 1)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


def spectral_lmo(gradient):
    d_out, d_in = gradient.shape
    return -np.sqrt(d_out / d_in) * newton_schulz(gradient)


def sign_lmo(gradient):
    return -np.sign(gradient) / gradient.shape[1]


class Algorithm:
    """State of Algorithm 1; `round` does lines 9-14 for one gradient, then lines 3-8.

    start: the model. lmos, w2s, s2w: an LMO and two compressors for every layer. With
    `error_feedback=False` every G_j and G are zero again before each round, so that the server
    sees the mean of C_w(M_j) alone.
    """

    def __init__(self, start, workers, lmos, beta, w2s, s2w, error_feedback=True):
        self.lmos, self.beta, self.w2s, self.s2w = lmos, beta, w2s, s2w
        self.error_feedback = error_feedback
        self.model = {name: layer.astype(np.float64) for name, layer in start.items()}  # W
        self.iterate = dict(self.model)  # X
        self.momentum = [None] * workers  # M_j
        self.estimates = [self._zeros() for _ in range(workers)]  # G_j
        self.gradient = self._zeros()  # G

    def _zeros(self):
        return {name: np.zeros(layer.shape) for name, layer in self.model.items()}

    def round(self, gradients, radii, w2s_sketches, s2w_sketches):
        """gradients[j], w2s_sketches[j], radii, s2w_sketches: dicts by layer."""
        workers = len(gradients)
        if not self.error_feedback:
            self.estimates = [self._zeros() for _ in range(workers)]
            self.gradient = self._zeros()
        for j, gradient in enumerate(gradients):
            old = self.momentum[j] or gradient
            self.momentum[j] = {
                name: (1 - self.beta) * old[name] + self.beta * gradient[name] for name in gradient
            }
            for name in gradient:
                message = self._send(j, name, w2s_sketches[j].get(name))
                self.gradient[name] = self.gradient[name] + message / workers
        for name, gradient in self.gradient.items():
            self.iterate[name] = self.iterate[name] + radii[name] * self.lmos[name](gradient)
            shift = self.s2w[name](self.iterate[name] - self.model[name], s2w_sketches.get(name))
            self.model[name] = self.model[name] + shift

    def _send(self, j, name, sketch):
        """Lines 10-11 for one layer: worker j's message."""
        message = self.w2s[name](self.momentum[j][name] - self.estimates[j][name], sketch)
        self.estimates[j][name] = self.estimates[j][name] + message
        return message


class ServedAlgorithm(Algorithm):
    """EF14 for lines 10-11 and 14: e_j in place of G_j decays, and G is a momentum of messages."""

    def __init__(self, *arguments, error_decay, server_momentum):
        super().__init__(*arguments)
        self.error_decay, self.server_momentum = error_decay, server_momentum

    def round(self, *arguments):
        self.gradient = {n: self.server_momentum * layer for n, layer in self.gradient.items()}
        super().round(*arguments)

    def _send(self, j, name, sketch):
        difference = self.momentum[j][name] + self.error_decay * self.estimates[j][name]
        message = self.w2s[name](difference, sketch)
        self.estimates[j][name] = difference - message
        return message
