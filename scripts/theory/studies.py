"""What `scripts/theory/run.py` runs, as records: the cases of both theorems, and feedback."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import sqrt

import torch
from torch import Tensor

from ef21_muon.compressors import Identity, Scaled, TopK
from ef21_muon.norms.lmo import AdaptiveRadius, Euclidean
from scripts.theory.algorithm import gradient_norms, on_workers, simulate, train
from scripts.theory.bounds import GeneralizedSmooth, LSmooth
from scripts.theory.problems import Pulling, Quadratic, Rippled, geometry

WORKERS, SIDE = 4, 4
HORIZONS, LONGEST = (16, 64, 256, 1024, 4096), 16384
REPLICAS = 8  # where there is noise
TOP = TopK(0.25)  # alpha_D = 1/4 on 4 x 4 matrices
DAMPING = Scaled(Identity(), 0.5)  # C(x) = x / 2, so alpha_P = 3/4 in every norm
ALPHA_D, ALPHA_P = 0.25, 0.75
THEOREMS = ("L-smooth", "(L0, L1)-smooth")
GEOMETRIES = ("spectral", "max")
# E ||xi||_2^2 is sigma^2. Steps of the second theorem go eta (K + 1)^(1/4) far at most, so that its
# problems start near their centre.
SIGMAS = {"L-smooth": 1.0, "(L0, L1)-smooth": 0.3}
DISTANCES = {"spectral": 0.12, "max": 0.4}

VARIANTS = {"none": "none", "ef14": "EF14", "ef21": "EF21"}


@dataclass(frozen=True)
class Case:
    """A theorem on a problem; `sigma` is the noise."""

    theorem: str
    geometry: str
    sigma: float

    @cached_property
    def problem(self) -> Quadratic | Rippled:
        """Targets are a centre, of the distance from X^0 = 0 that fits, and Gaussian spread."""
        quadratic = self.theorem == "L-smooth"
        centre, *spread = gaussian(1 + WORKERS, seed=0)
        distance, width = (1, 0.5) if quadratic else (DISTANCES[self.geometry], 0.3)
        weights = torch.linspace(0.5, 1.5, WORKERS, dtype=torch.float64)
        kind = Quadratic if quadratic else Rippled
        return kind(weights, distance * centre + width * torch.stack(spread))

    @cached_property
    def numbers(self) -> LSmooth | GeneralizedSmooth:
        """The theorem for the problem's constants."""
        constants = {"alpha_D": ALPHA_D, "sigma": self.sigma}
        if self.theorem == "L-smooth":
            constants["alpha_P"] = ALPHA_P
        return self.problem.theorem(geometry(self.geometry, SIDE, SIDE), **constants)

    @property
    def horizons(self) -> tuple[int, ...]:
        """One more where the rate of a half shows late."""
        return HORIZONS if self.sigma or self.theorem != "L-smooth" else (*HORIZONS, LONGEST)

    @property
    def replicas(self) -> int:
        return 1 if self.sigma == 0 else REPLICAS

    def options(self, rounds: int) -> dict:
        """What the theorem prescribes for K = `rounds`."""
        options = {
            "norm": geometry(self.geometry, SIDE, SIDE).norm,
            "w2s": TOP,
            "momentum": 1 - self.numbers.beta(rounds),
        }
        if self.theorem == "L-smooth":
            radius = AdaptiveRadius(1 / self.numbers.gamma(rounds), 0)
            return options | {"radius": radius, "s2w": DAMPING, "first_message": "full"}
        radius = self.numbers.radius(rounds)
        return options | {"radius": radius, "s2w": Identity(), "first_message": "compressed"}

    def bounded(self, norms: Tensor) -> float:
        """What the theorem bounds, of ||grad f(X^k)||_* (K + 1, replicas), as a gradient norm.

        The root of the mean square over k < K, or the least mean over k <= K.
        """
        if self.theorem == "L-smooth":
            return float(norms[:-1].square().mean().sqrt())
        return float(norms.mean(1).min())

    def bound(self, rounds: int) -> float:
        """The theorem's bound on `bounded`."""
        bound = self.numbers.bound(rounds)
        return sqrt(bound) if self.theorem == "L-smooth" else bound

    def records(self, horizons: Sequence[int]) -> Iterator[dict]:
        """Simulate every horizon with its own parameters; a record each."""
        for rounds in horizons:
            options = self.options(rounds)
            models = simulate(self.problem, rounds, self.replicas, self.sigma, **options)
            norms = gradient_norms(self.problem, options["norm"], models)
            yield {
                **{"record": "bound", **asdict(self), "rounds": rounds},
                **{"beta": self.numbers.beta(rounds), "replicas": self.replicas},
                **{"measured": self.bounded(norms), "bound": self.bound(rounds)},
            }


CASES = [
    Case(theorem, place, sigma)
    for theorem in THEOREMS
    for place in GEOMETRIES
    for sigma in (0.0, SIGMAS[theorem])
]


def gaussian(count: int, seed: int) -> Tensor:
    """(count, SIDE, SIDE), float64."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, SIDE, SIDE, generator=random, dtype=torch.float64)


def two_workers() -> Quadratic:
    """f_1 and f_2 of curvature 1/2 and 3/2, with distant minimisers."""
    return Quadratic(torch.tensor([0.5, 1.5], dtype=torch.float64), gaussian(2, seed=1))


def feedback(problem, kept: int, step_size: float, rounds: int) -> dict[str, list[float]]:
    """||grad f(X^k)||_2 of gradient descent on the top `kept` entries of every worker's gradient.

    By variant of error feedback, k = 0, ..., rounds; to be called on one process per worker.
    """
    options = {
        "norm": Euclidean(),
        "radius": AdaptiveRadius(1 / step_size, 0.0),
        "w2s": TopK(kept / problem.start.numel()),
        "momentum": 0.0,
    }
    result = {}
    for variant in VARIANTS:
        models = train(problem, rounds, feedback=variant, **options)
        result[variant] = gradient_norms(problem, options["norm"], models)[:, 0].tolist()
    return result


def feedback_records() -> Iterator[dict]:
    """Two workers with two step sizes, and the three workers of `Pulling`."""
    two = two_workers()
    runs = ((2, two, 2, 0.1, 400), (2, two, 2, 0.02, 400), (3, Pulling(), 1, 0.02, 200))
    for workers, problem, kept, step_size, rounds in runs:
        curves = on_workers(workers, feedback, problem, kept, step_size, rounds)
        for variant, norms in curves.items():
            what = {"record": "feedback", "workers": workers, "step_size": step_size}
            yield what | {"feedback": variant, "gradient_norms": norms}
