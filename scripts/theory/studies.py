"""The studies of `scripts/theory/run.py` as records: bounds, feedback, Lipschitz functions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import sqrt

import torch
from torch import Tensor

from ef21_muon.compressors.base import Identity
from ef21_muon.compressors.low_rank import RankK
from ef21_muon.compressors.rare import Scaled
from ef21_muon.compressors.sparse import TopK
from ef21_muon.norms.lmo import AdaptiveRadius, Euclidean, Spectral
from scripts.theory.algorithm import (
    Setting,
    gradient_norms,
    muon,
    on_workers,
    simulate,
    train,
)
from scripts.theory.bounds import GeneralizedSmooth, LSmooth
from scripts.theory.problems import Pulling, Quadratic, Rippled, Valley, geometry

WORKERS, SIDE = 4, 4
HORIZONS = (16, 64, 256, 1024, 4096)
LONGEST = 16384  # added where one run gives all horizons
REPLICAS = 8  # where noise or a compressor is random
CHECKED = 64  # the horizon that is run by EF21Muon too
COMPRESSORS = {"top": TopK(0.25), "rank": RankK(0.25)}  # alpha_D = 1/4 on 4 x 4 matrices
DAMPING = Scaled(Identity(), 0.5)  # C(x) = x / 2, so alpha_P = 3/4 in every norm
ALPHA_D, ALPHA_P = 0.25, 0.75
THEOREMS = ("L-smooth", "(L0, L1)-smooth")
GEOMETRIES = ("spectral", "max")
# E ||xi||_2^2 is sigma^2. Steps of the second theorem go eta (K + 1)^(1/4) far at most, so that its
# problems start near their centre.
SIGMAS = {"L-smooth": 1.0, "(L0, L1)-smooth": 0.3}
DISTANCES = {"spectral": 0.12, "max": 0.4}

VARIANTS = ("none", "ef14", "ef21")
FEEDBACK_ROUNDS = 400
STEP_SIZES = (0.1, 0.02)
PULLING_ROUNDS, PULLING_STEP = 200, 0.02

SCHEDULES = {
    "0.01": lambda k: 0.01,
    "0.3 / sqrt(k + 1)": lambda k: 0.3 / sqrt(k + 1),
    "1 / (k + 1)": lambda k: 1 / (k + 1),
}
VALLEYS = ((0.1, 0.6, 3000), (0.02, 0.1, 10000))  # slope, beta, rounds
VALLEY_RUNS = [
    (*valley, *method)
    for valley in VALLEYS
    for method in (
        *(("Muon", schedule) for schedule in SCHEDULES),
        ("error feedback", "0.3 / sqrt(k + 1)"),
    )
]


@dataclass(frozen=True)
class Case:
    """A theorem on a problem: `w2s` is a key of COMPRESSORS, `sigma` the noise."""

    theorem: str
    geometry: str
    w2s: str
    sigma: float

    @cached_property
    def problem(self) -> Quadratic | Rippled:
        """Targets are a centre, of the distance from X^0 = 0 that fits, and Gaussian spread."""
        quadratic = self.theorem == "L-smooth"
        random = torch.Generator().manual_seed(0)
        centre = torch.randn(SIDE, SIDE, generator=random, dtype=torch.float64)
        spread = torch.randn(WORKERS, SIDE, SIDE, generator=random, dtype=torch.float64)
        distance, width = (1, 0.5) if quadratic else (DISTANCES[self.geometry], 0.3)
        weights = torch.linspace(0.5, 1.5, WORKERS, dtype=torch.float64)
        kind = Quadratic if quadratic else Rippled
        return kind(weights, distance * centre + width * spread)

    @cached_property
    def numbers(self) -> LSmooth | GeneralizedSmooth:
        """The theorem for the problem's constants."""
        constants = {"alpha_D": ALPHA_D, "sigma": self.sigma}
        if self.theorem == "L-smooth":
            constants["alpha_P"] = ALPHA_P
        return self.problem.theorem(geometry(self.geometry, SIDE, SIDE), **constants)

    @property
    def one_run(self) -> bool:
        """Whether the parameters are the same for every K."""
        return self.theorem == "L-smooth" and self.sigma == 0

    @property
    def replicas(self) -> int:
        return 1 if self.sigma == 0 and self.w2s == "top" else REPLICAS

    def setting(self, rounds: int) -> Setting:
        """What the theorem prescribes for K = `rounds`."""
        numbers = self.numbers
        first = self.theorem == "L-smooth"
        radius = AdaptiveRadius(1 / numbers.gamma(rounds), 0) if first else numbers.radius(rounds)
        return Setting(
            norm=geometry(self.geometry, SIDE, SIDE).norm,
            w2s=COMPRESSORS[self.w2s],
            beta=numbers.beta(rounds),
            radius=radius,
            s2w=DAMPING if first else Identity(),
            first_message="full" if first else "compressed",
            sigma=self.sigma,
        )

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

    def records(self, horizons: Sequence[int], run: Callable = simulate) -> list[dict]:
        """Run every horizon with its own parameters; a record each. `run`: simulate or train."""
        problem, norm = self.problem, geometry(self.geometry, SIDE, SIDE).norm
        shared = None
        if self.one_run:
            longest = max(horizons)
            models = run(problem, self.setting(longest), longest, self.replicas)
            shared = gradient_norms(problem, norm, models)
        records = []
        for rounds in horizons:
            norms = shared
            if norms is None:
                models = run(problem, self.setting(rounds), rounds, self.replicas)
                norms = gradient_norms(problem, norm, models)
            setting = self.setting(rounds)
            records.append(
                {"record": "bound", "run": run.__name__, **asdict(self), "rounds": rounds}
                | {"beta": setting.beta, "replicas": self.replicas}
                | {"measured": self.bounded(norms[: rounds + 1]), "bound": self.bound(rounds)}
            )
        return records


CASES = [
    Case(theorem, place, w2s, sigma)
    for theorem in THEOREMS
    for place in GEOMETRIES
    for sigma in (0.0, SIGMAS[theorem])
    for w2s in COMPRESSORS
]


def simulated(case: Case) -> list[dict]:
    """The records of a case, as a process of a pool calls it."""
    torch.set_num_threads(1)
    return case.records((*HORIZONS, LONGEST) if case.one_run else HORIZONS)


def trained() -> list[dict]:
    """Every case with K = CHECKED by EF21Muon, to be called on WORKERS processes."""
    return [record for case in CASES for record in case.records([CHECKED], train)]


def two_workers() -> Quadratic:
    """f_1 and f_2 of curvature 1/2 and 3/2, with distant minimisers."""
    random = torch.Generator().manual_seed(1)
    targets = torch.randn(2, SIDE, SIDE, generator=random, dtype=torch.float64)
    return Quadratic(torch.tensor([0.5, 1.5], dtype=torch.float64), targets)


def feedback(problem, kept: int, step_size: float, rounds: int) -> dict[str, list[float]]:
    """||grad f(X^k)||_2 of gradient descent on the top `kept` entries of every worker's gradient.

    By variant of error feedback, k = 0, ..., rounds; to be called on one process per worker.
    """
    result = {}
    for variant in VARIANTS:
        setting = Setting(
            norm=Euclidean(),
            w2s=TopK(kept / problem.start.numel()),
            beta=1.0,
            radius=AdaptiveRadius(1 / step_size, 0.0),
            s2w=Identity(),
            first_message="compressed",
            feedback=variant,
        )
        models = train(problem, setting, rounds)
        result[variant] = gradient_norms(problem, setting.norm, models)[:, 0].tolist()
    return result


def feedback_records() -> Iterator[dict]:
    """Two workers with two step sizes, and the three workers of `Pulling`."""
    runs = [(2, two_workers(), 2, step, FEEDBACK_ROUNDS) for step in STEP_SIZES]
    runs.append((3, Pulling(), 1, PULLING_STEP, PULLING_ROUNDS))
    for workers, problem, kept, step_size, rounds in runs:
        curves = on_workers(workers, feedback, problem, kept, step_size, rounds)
        for variant, norms in curves.items():
            what = {"record": "feedback", "workers": workers, "step_size": step_size}
            yield what | {"feedback": variant, "gradient_norms": norms}


def valley_record(run: tuple[float, float, int, str, str]) -> dict:
    """The least f so far, at powers of 2^(1/4), of one of VALLEY_RUNS."""
    torch.set_num_threads(1)
    slope, beta, rounds, method, schedule = run
    valley, norm = Valley(slope), Spectral("svd", scaling="none")
    feedback = method == "error feedback"
    values = valley.value(muon(valley, norm, beta, SCHEDULES[schedule], rounds, feedback))
    places = sorted({min(rounds, round(2 ** (p / 4))) for p in range(56)})
    what = {"record": "valley", "slope": slope, "beta": beta, "method": method}
    curve = {"rounds": places, "least_value": values.cummin(0).values[places].tolist()}
    return what | {"schedule": schedule, "start": float(values[0])} | curve
