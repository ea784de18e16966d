"""The runs of the study in results/shakespeare, as overrides of `experiment=shakespeare`.

The uncompressed run is tuned by a grid, on half the steps; the best radii and beta, TUNED, hold for
everything else that takes its step, as in the paper. Other baselines have grids of their own.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone. `family` is the part of the study they are in."""

    name: str
    family: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class StudyRun:
    """A run: the name of its log below results/shakespeare, and what it overrides."""

    name: str
    overrides: tuple[str, ...]


SEEDS = (0, 1, 2)
PERCENT = (5, 10, 15, 20)
GRID_STEPS = "steps=300"


def setting(name: str, family: str, overrides: str, seeds: tuple[int, ...] = (0,)) -> Setting:
    return Setting(name, family, tuple(overrides.split()), seeds)


def rank(percent: float, values: str) -> str:
    return f"compressor@w2s=rank w2s.fraction={percent / 100:g} w2s.values={values}"


def top(percent: float, values: str) -> str:
    return f"compressor@w2s=topk w2s.fraction={percent / 100:g} w2s.values={values}"


def fitted(percent: float, formats: str = "") -> str:
    return f"compressor@w2s=fitted_rank w2s.fraction={percent / 100:g} {formats}"


def back(compressor: str) -> str:
    """The same for what servers send."""
    return compressor.replace("w2s", "s2w")


def grid(method: str, overrides: str, **values: tuple[float, ...]) -> list[Setting]:
    """All combinations of the values of keys, in which __ stands for a dot."""
    points = [(method, f"{overrides} {GRID_STEPS}")]
    for key, choices in values.items():
        short = key.split("__")[-2 if key.endswith("radius") else -1]
        points = [
            (f"{name}-{short}{value:g}", f"{given} {key.replace('__', '.')}={value:g}")
            for name, given in points
            for value in choices
        ]
    return [setting(f"grid/{name}", "grid", given) for name, given in points]


INT5 = "{format:int5,stochastic:false}"  # rounded to nearest, a scale a row
IDENTITY = "compressor@w2s=identity"
HIDDEN, EMBEDDING = "norm.hidden.radius=1", "norm.embedding.radius=60"
BETA = "optimizer.beta=0.1"
POWERSGD = "optimizer=muon_powersgd checkpoint.every=0"  # torch keeps its state to itself
DION = "optimizer=dion optimizer.values=natural optimizer.weight_decay=0"
DION32 = "optimizer=dion optimizer.lion_lr=0.01 optimizer.weight_decay=0"  # float32 factors
DEMO = "optimizer=demo optimizer.values=int8"
# The best of the grids below, for everything that takes EF21-Muon's step.
TUNED = "norm.hidden.radius=2 norm.embedding.radius=60 optimizer.beta=0.2"


def ours(name: str, family: str, overrides: str, seeds: tuple[int, ...] = (0,)) -> Setting:
    return setting(name, family, f"{overrides} {TUNED}", seeds)


SETTINGS = [
    # Of the uncompressed run a cross, each tuned with the others at their first choice, and then
    # the best of each arm together.
    *grid("identity", f"{IDENTITY} {EMBEDDING} {BETA}", norm__hidden__radius=(0.5, 1, 2, 4)),
    *grid("identity", f"{IDENTITY} {HIDDEN} {BETA}", norm__embedding__radius=(30, 120)),
    *grid("identity", f"{IDENTITY} {HIDDEN} {EMBEDDING}", optimizer__beta=(0.05, 0.2, 0.4)),
    *grid("identity", f"{IDENTITY} {EMBEDDING}", norm__hidden__radius=(2,), optimizer__beta=(0.2,)),
    ours("identity", "identity", IDENTITY, SEEDS),
    *(ours(f"rank{p}-int5", "rank, int5", rank(p, INT5)) for p in (30, 10, 5, 40)),
    ours("singular10-int5", "singular, int5", rank(10, INT5).replace("=rank", "=top_singular")),
    *(ours(f"fitted{p}", "fitted rank", fitted(p)) for p in (4, 9, 12, 20, 30)),
    *(ours(f"rank{p}", "rank", rank(p, "float32")) for p in PERCENT),
    *(ours(f"top{p}", "top", top(p, "float32")) for p in PERCENT),
    ours("natural", "dense", "compressor@w2s=natural"),
    *(ours(f"rank{p}-natural", "rank", rank(p, "natural")) for p in (5, 10, 15)),
    *(ours(f"top{p}-natural", "top", top(p, "natural")) for p in (5, 15)),
    *(ours(f"rank{p}-natural4", "rank", rank(p, "natural4")) for p in (5, 10, 15)),
    *(ours(f"top{p}-natural4", "top", top(p, "natural4")) for p in (5, 15)),
    ours("sign", "dense", "compressor@w2s=sign"),
    *(
        ours(f"{kind}-{feedback}", "feedback", f"{message} optimizer.feedback={feedback}")
        for kind, message in (("rank5", rank(5, "float32")), ("top5", top(5, "float32")))
        for feedback in ("ef14", "none")
    ),
    ours("rank10-int5-both", "both ways", f"{rank(10, INT5)} {back(rank(10, INT5))}"),
    *grid("adamw", "optimizer=adamw", optimizer__lr=(0.001, 0.002, 0.004, 0.008)),
    *grid("powersgd", f"{POWERSGD} optimizer.rank=16 {TUNED}", optimizer__lr=(0.01, 0.02, 0.04)),
    *grid("dion", DION, optimizer__lr=(0.01, 0.02, 0.04), optimizer__lion_lr=(0.003, 0.01)),
    *grid("dion32", DION32, optimizer__lr=(0.02, 0.04), optimizer__mu=(0.95, 0.8)),
    *grid("demo", DEMO, optimizer__lr=(0.001, 0.003, 0.005, 0.01, 0.03)),
]
RUNS = [
    StudyRun(f"{one.name}-seed{seed}", (*one.overrides, f"seed={seed}"))
    for seed in SEEDS
    for one in SETTINGS
    if seed in one.seeds
]
