"""Local steps and their rounds in NumPy and float64: one process plays servers and n workers.

Written from the definition for the tests, with nothing of ef21_muon. A layer is an (m, n) array, a
model a dict of layers. A compressor maps a matrix to what its payload says.
"""

import numpy as np


def statistical_steps(x, bits, span=6.0):
    """Where entries are among 2^bits bins, before rounding, and the mean: MuLoCo's quantiser."""
    bins, mean = 2**bits, sum(x.flat) / x.size
    squares = sum((entry - mean) ** 2 for entry in x.flat)
    scale = span * np.sqrt(squares / max(1, x.size - 1)) / bins
    return (x - mean) / (scale or 1) + bins // 2, mean


def statistical(bits, span=6.0):
    """A table of bins' means for the whole array."""

    def round_(x):
        steps, mean = statistical_steps(x, bits, span)
        codes = [min(max(round(step), 0), 2**bits - 1) for step in steps.flat]
        members = {code: [] for code in codes}
        for code, entry in zip(codes, x.flat, strict=True):
            members[code].append(entry - mean)
        table = {code: sum(entries) / len(entries) for code, entries in members.items()}
        return np.array([mean + table[code] for code in codes]).reshape(x.shape)

    return round_


def chunk_top_k(k, chunk, rounding):
    """SparseLoCo's: the kept entries of all chunks, chunk after chunk, are rounded together."""

    def compress(x):
        tall, wide = (max(d for d in range(1, chunk + 1) if side % d == 0) for side in x.shape)
        kept = min(tall * wide, max(1, round(tall * wide * k / chunk**2)))
        places = []
        for top in range(0, x.shape[0], tall):
            for left in range(0, x.shape[1], wide):
                cells = [(top + i, left + j) for i in range(tall) for j in range(wide)]
                places += sorted(sorted(cells, key=lambda cell: -abs(x[cell]))[:kept])
        rows, columns = np.array(places).T
        result = np.zeros(x.shape)
        result[rows, columns] = rounding(x[rows, columns])
        return result

    return compress


class GradientDescent:
    """torch.optim.SGD with momentum, without dampening."""

    def __init__(self, lr, momentum):
        self.lr, self.momentum, self.buffers = lr, momentum, {}

    def step(self, model, gradients):
        for name, gradient in gradients.items():
            self.buffers[name] = self.momentum * self.buffers.get(name, 0) + gradient
            model[name] = model[name] - self.lr * self.buffers[name]


class AdamW:
    """Loshchilov and Hutter, arXiv:1711.05101, algorithm 2, with decay times the learning rate."""

    def __init__(self, lr, betas, weight_decay, eps):
        self.lr, self.betas, self.weight_decay, self.eps = lr, betas, weight_decay, eps
        self.means, self.squares, self.steps = {}, {}, 0

    def step(self, model, gradients):
        self.steps += 1
        of_mean, of_square = self.betas
        for name, g in gradients.items():
            mean = self.means[name] = of_mean * self.means.get(name, 0) + (1 - of_mean) * g
            square = of_square * self.squares.get(name, 0) + (1 - of_square) * g**2
            self.squares[name] = square
            unbiased = mean / (1 - of_mean**self.steps)
            scale = np.sqrt(square / (1 - of_square**self.steps)) + self.eps
            decayed = (1 - self.lr * self.weight_decay) * model[name]
            model[name] = decayed - self.lr * unbiased / scale


class Muon:
    """A moving average from zero, orthogonalised; decay times the learning rate. For matrices.

    lmo: of a matrix, minus the orthogonal one times the scale. `others`, layers by name, are
    stepped by `rest`.
    """

    def __init__(self, lr, momentum, weight_decay, lmo, others, rest):
        self.lr, self.momentum, self.weight_decay, self.lmo = lr, momentum, weight_decay, lmo
        self.averages, self.others, self.rest = {}, others, rest

    def step(self, model, gradients):
        for name, g in gradients.items():
            if name not in self.others:
                self.averages[name] = (
                    self.momentum * self.averages.get(name, 0) + (1 - self.momentum) * g
                )
                decayed = (1 - self.lr * self.weight_decay) * model[name]
                model[name] = decayed + self.lr * self.lmo(self.averages[name])
        self.rest.step(model, {name: gradients[name] for name in self.others})


class LocalRounds:
    """n workers that step by themselves, and whose differences from W are averaged.

    turns: of every layer the step in a round, from 0, after which it is sent; a message takes
    `sync_delay` steps, `ways` of them until W moves. gradient(model, worker) gives a worker's
    gradients.
    kept: of what a worker sends, 1 for the entries that its message has, so that a mean is over
    the workers that sent an entry; without it over all.
    """

    def __init__(self, start, workers, gradient, new_inner, sync_every, turns, **options):
        self.sync_every, self.turns, self.gradient = sync_every, turns, gradient
        self.shared = {name: layer.astype(np.float64) for name, layer in start.items()}  # W
        self.models = [dict(self.shared) for _ in range(workers)]  # x_j
        self.inner = [new_inner() for _ in range(workers)]
        self.errors = [dict.fromkeys(start, 0.0) for _ in range(workers)]  # e_j, or G_j
        self.velocity = dict.fromkeys(start, 0.0)  # V
        self.mean_estimate = dict.fromkeys(start, 0.0)  # G
        self.server_error = dict.fromkeys(start, 0.0)  # e_s
        defaults = {"feedback": "ef14", "error_decay": 1.0, "outer_lr": 1.0, "outer_momentum": 0.0}
        defaults |= {"nesterov": True, "sync_delay": 0, "ways": 1, "kept": None}
        for name, value in (defaults | options).items():
            setattr(self, name, value)
        self.under_way, self.steps = [], 0

    def step(self):
        for worker, model in enumerate(self.models):
            self.inner[worker].step(model, self.gradient(model, worker))
        for layer, turn in self.turns.items():
            if self.steps % self.sync_every == turn:
                self.send(layer)
        self.arrive(self.steps)
        self.steps += 1

    def final_sync(self):
        """What is under way arrives, and then all that was done since is sent, at once."""
        just_sent = [
            n for n, turn in self.turns.items() if (self.steps - 1) % self.sync_every == turn
        ]
        for later in range(self.steps, self.steps + self.ways * self.sync_delay):
            self.arrive(later)
        for layer in self.turns.keys() - set(just_sent):
            self.send(layer)
            self.arrive(max(due for due, *_ in self.under_way))

    def send(self, layer):
        """The layer's turn: every worker's message is on its way."""
        messages, departures = [], []
        for model, error in zip(self.models, self.errors, strict=True):
            target = self.shared[layer] - model[layer]
            departures.append(model[layer])
            if self.feedback == "ef14":
                target = target + self.error_decay * error[layer]
                sent = self.w2s(target)
                error[layer] = target - sent
            elif self.feedback == "ef21":
                sent = self.w2s(target - error[layer])
                error[layer] = error[layer] + sent
            else:
                sent = self.w2s(target)
            messages.append((sent, self.kept(target) if self.kept else 1))
        due = self.steps + self.ways * self.sync_delay
        self.under_way.append((due, layer, messages, departures))

    def arrive(self, step):
        for message in [one for one in self.under_way if one[0] == step]:
            self.under_way.remove(message)
            _, layer, messages, departures = message
            total, senders = (sum(parts) for parts in zip(*messages, strict=True))
            shift = self.serve(layer, total / np.maximum(1, senders))
            self.shared[layer] = self.shared[layer] - shift
            for model, departure in zip(self.models, departures, strict=True):
                model[layer] = model[layer] + (self.shared[layer] - departure)

    def serve(self, layer, mean):
        if self.feedback == "ef21":
            mean = self.mean_estimate[layer] = self.mean_estimate[layer] + mean
        self.velocity[layer] = self.outer_momentum * self.velocity[layer] + mean
        ahead = mean + self.outer_momentum * self.velocity[layer]
        step = self.outer_lr * (ahead if self.nesterov else self.velocity[layer])
        shift = self.s2w(step + self.server_error[layer])
        self.server_error[layer] = step + self.server_error[layer] - shift
        return shift
