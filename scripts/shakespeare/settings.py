"""The settings of the study in results/shakespeare, as overrides of `experiment=shakespeare`.

The uncompressed run is tuned by a grid, on half the steps; the best radii and momentum, TUNED,
hold for everything else that takes its step, as in the paper. Other baselines have grids of their
own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone: of a `family` in the study, a `level` of it."""

    name: str
    family: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    level: str = ""
    workers: int = 2
    device: str = "cpu"  # or "cuda", or "either"


SEEDS = (0, 1, 2)
PERCENT = (5, 10, 15, 20)
GRID_STEPS = "steps=300"


def setting(
    name: str, family: str, overrides: str, seeds: Sequence[int] = (0,), level: str = ""
) -> Setting:
    return Setting(name, family, tuple(overrides.split()), tuple(seeds), level)


def alone(name: str, family: str, overrides: str, seeds: Sequence[int] = (0,)) -> Setting:
    """Of one worker, which has the whole batch."""
    return replace(setting(name, family, overrides, seeds), workers=1)


def rank(percent: float, values: str) -> str:
    return f"compressor@w2s=rank w2s.fraction={percent / 100:g} w2s.values={values}"


def top(percent: float, values: str) -> str:
    return f"compressor@w2s=topk w2s.fraction={percent / 100:g} w2s.values={values}"


def fitted(percent: float) -> str:
    return f"compressor@w2s=quantized_rank w2s.fraction={percent / 100:g}"


def powersgd(rank: int) -> str:
    return f"{POWERSGD} optimizer.rank={rank} {TUNED}"


def greedylore(rank: int, every: int) -> str:
    return (
        f"optimizer=muon_greedylore optimizer.rank={rank} optimizer.refresh_every={every} {TUNED}"
    )


def dion(percent: float, values: str) -> str:
    best = "optimizer.lr=0.04 optimizer.mu=0.8"
    return f"{DION32} {best} optimizer.rank_fraction={percent / 100:g} optimizer.values={values}"


def served(percent: float, of_embedding: float, decay: float = 0.92) -> str:
    """Momentum at the server, and a rank of its own for the embedding."""
    embedding = f"{EMBEDDING_FITTED}={of_embedding / 100:g}"
    return f"{fitted(percent)} {embedding} {SERVED} optimizer.error_decay={decay:g} {RADII}"


def dense(bits: int) -> str:
    return f"compressor@w2s=quantize w2s.values=normal{bits}"


def local(every: int | str, message: str, *options: str) -> str:
    """Scion's steps on every worker, with the uncompressed run's radii and momentum."""
    of_optimizer = " ".join(f"optimizer.{option}" for option in options)
    return f"{LOCAL} optimizer.sync_every={every} {message} {of_optimizer}"


def back(compressor: str) -> str:
    """The same for what servers send."""
    return compressor.replace("w2s", "s2w")


def grid(method: str, overrides: str, **values: tuple[float, ...]) -> list[Setting]:
    """All combinations of the values of keys, in which __ stands for a dot."""
    points = [(method, f"{overrides} {GRID_STEPS}")]
    for key, choices in values.items():
        short = key.split("__")[-2 if key.endswith("radius") else -1]
        points = [
            (f"{name}-{_in_name(short, value)}", f"{given} {key.replace('__', '.')}={value:g}")
            for name, given in points
            for value in choices
        ]
    return [setting(f"grid/{name}", "grid", given) for name, given in points]


def _in_name(key: str, value: float) -> str:
    """A value in the name of a log. Momentum stands there as the paper's beta, 1 - momentum."""
    return f"beta{1 - value:g}" if key == "momentum" else f"{key}{value:g}"


EMBEDDING_FITTED = "+compressor@norm.embedding.w2s=quantized_rank norm.embedding.w2s.fraction"
EMBEDDING_DENSE = "+compressor@norm.embedding.w2s=quantize norm.embedding.w2s.values"
INT5 = "{format:int5,rounding:nearest}"  # rounded to nearest, a scale per row
IDENTITY = "compressor@w2s=identity"
HIDDEN, EMBEDDING = "norm.hidden.radius=1", "norm.embedding.radius=60"
BETA = "optimizer.momentum=0.9"
LOW_RATE = f"{fitted(4)} {EMBEDDING}"
LOCAL = "optimizer=local norm.hidden.radius=2"
# Rounds that get shorter as the lr falls, which it does from 60 % of the steps on.
SHORTER, SIGNS = "{0:120,360:60}", "compressor@w2s=sign"
# A scale per layer, but of the embedding a scale per row: bytes differ in how often they come.
SIGN_A_LAYER = f"{SIGNS} w2s.values=sign@tensor"
SIGNS_BY_MESSAGE = f"{SIGN_A_LAYER} +compressor@norm.embedding.w2s=sign"
OF_HIDDEN = {"message": SIGN_A_LAYER, "normal1": f"{dense(1)}@tensor"}  # rotated or not
CHUNKS = "compressor@w2s=chunk_topk"  # as SparseLoCo has them
OUTER, HALF, EF21 = "outer_momentum=0.3", "error_decay=0.5", "feedback=ef21"
MULOCO = (
    "optimizer=muloco norm.hidden.radius=2 w2s.values=statistical2 optimizer.inner.others.lr=0.004"
)
DILOCO = "optimizer=diloco optimizer.sync_every=30 optimizer.inner.lr=0.004"
SPARSELOCO = "optimizer=sparseloco optimizer.mean=all"  # made before there was another mean
BEST_OF_PEERS = {  # of the grids below
    "DiLoCo": f"{DILOCO} optimizer.outer_momentum=0.3",
    "MuLoCo": f"{MULOCO} optimizer.outer_momentum=0.3",
    "SparseLoCo": f"{SPARSELOCO} optimizer.inner.lr=0.004",
}
DISTRO = "optimizer=demo optimizer.values=sign optimizer.k=4"  # 0.02 bits per parameter and step
DENSE_BACK = "compressor@s2w=sign s2w.values=normal2"
POWERSGD = "optimizer=muon_powersgd checkpoint.every=0"  # torch keeps its state to itself
DION = "optimizer=dion optimizer.values=natural optimizer.weight_decay=0"
DION32 = "optimizer=dion optimizer.lion_lr=0.01 optimizer.weight_decay=0"  # float32 factors
DEMO = "optimizer=demo optimizer.values=int8"
# The best of the grids below, for everything that takes EF21-Muon's step; with momentum at the
# server the radii alone.
RADII = "norm.hidden.radius=2 norm.embedding.radius=60"
TUNED = f"{RADII} optimizer.momentum=0.8"
ONE_SIGN = (  # per entry, and a scale per layer
    "compressor@w2s=sign w2s.values=sign@tensor +compressor@norm.embedding.w2s=identity"
)
SERVED = "optimizer.feedback=ef14 optimizer.momentum=0 optimizer.server_momentum=0.7"


# Four in bytes to the target, one below a quarter of a bit, one in loss at a tenth of the bytes.
BEST = ("served6", "fitted9", "served12", "fitted12", "served3", "rank40-int5")


def ours(name: str, family: str, overrides: str, level: str = "") -> Setting:
    return setting(name, family, f"{overrides} {TUNED}", seeds(name), level)


def seeds(name: str) -> tuple[int, ...]:
    return SEEDS if name in ("identity", *BEST) else (0,)


def levels(family: str, message: Callable, percents: Sequence[int], format: str) -> list[Setting]:
    """A low-rank or sparse compressor in one format: a setting for each percentage."""
    ending = {"float32": "", INT5: " int5"}.get(format, f" {format}")
    return [
        ours(
            f"{family}{percent}{ending.replace(' ', '-')}",
            f"{family}{ending}",
            message(percent, format),
            level=f"{percent}%",
        )
        for percent in percents
    ]


SETTINGS = [
    # Of the uncompressed run a cross, each tuned with the others at their first choice, and then
    # the best of each arm together.
    *grid("identity", f"{IDENTITY} {EMBEDDING} {BETA}", norm__hidden__radius=(0.5, 1, 2, 4)),
    *grid("identity", f"{IDENTITY} {HIDDEN} {BETA}", norm__embedding__radius=(30, 120)),
    *grid("identity", f"{IDENTITY} {HIDDEN} {EMBEDDING}", optimizer__momentum=(0.95, 0.8, 0.6)),
    *grid(
        "identity", f"{IDENTITY} {EMBEDDING}", norm__hidden__radius=(2,), optimizer__momentum=(0.8,)
    ),
    ours("identity", "identity", IDENTITY),
    *(ours(f"fitted{p}", "quantized rank", fitted(p), level=f"{p}%") for p in (4, 9, 12, 30)),
    ours("fitted12-embedding", "embedding apart", f"{fitted(12)} {EMBEDDING_FITTED}=0.25"),
    *(
        setting(
            f"served{p}",
            "quantized rank, server momentum",
            served(p, of_embedding),
            seeds(f"served{p}"),
            level=f"{p}%",
        )
        for p, of_embedding in ((3, 10), (5, 16), (6, 20), (12, 25))
    ),
    *levels("rank", rank, (5, 10, 30, 40), INT5),
    ours("singular10-int5", "singular int5", rank(10, INT5).replace("=rank", "=top_singular")),
    *levels("rank", rank, PERCENT, "float32"),
    *levels("rank", rank, (5, 10, 15), "natural"),
    *levels("rank", rank, (5, 10, 15), "natural4"),
    *levels("top", top, PERCENT, "float32"),
    *levels("top", top, (5, 15), "natural"),
    *levels("top", top, (5, 15), "natural4"),
    ours("natural", "natural", "compressor@w2s=natural"),
    ours("sign", "sign", "compressor@w2s=sign"),
    *(
        ours(name, "int4", f"compressor@w2s=quantize w2s.values={values}", level=level)
        for name, values, level in (
            ("int4-message", "int4@tensor", "one block"),
            ("int4-112", "int4@112", "blocks of 112"),
            ("smooth4", "rowcol4", "rows and columns"),
        )
    ),
    *(
        ours(f"{kind}-{feedback}", "feedback", f"{message} optimizer.feedback={feedback}")
        for kind, message in (("rank5", rank(5, "float32")), ("top5", top(5, "float32")))
        for feedback in ("ef14", "none")
    ),
    ours("fitted12-both", "both ways", f"{fitted(12)} {back(fitted(12))}", level="low rank back"),
    ours("fitted12-dense", "both ways", f"{fitted(12)} {DENSE_BACK}", level="2 bits back"),
    setting("served6-both", "both ways", f"{served(6, 20)} {DENSE_BACK}", level="6%, 2 bits back"),
    *grid(
        "fitted4",
        LOW_RATE,
        norm__hidden__radius=(2,),
        optimizer__momentum=(0.95, 0.9, 0.8, 0.6, 0.2),
    ),
    *grid("fitted4", LOW_RATE, norm__hidden__radius=(1,), optimizer__momentum=(0.9,)),
    *grid("fitted4", f"{fitted(4)} {TUNED}", norm__hidden__norm__steps=(2, 3)),
    *(
        setting(f"grid/served3-decay{decay:g}", "grid", f"{served(3, 10, decay)} {GRID_STEPS}")
        for decay in (0.8, 0.92, 0.97)
    ),
    setting("muon", "Muon", f"optimizer=muon {TUNED}"),
    setting("adamw", "AdamW", "optimizer=adamw optimizer.lr=0.004"),
    *(setting(f"powersgd{r}", "Muon + PowerSGD", powersgd(r), level=f"rank {r}") for r in (4, 16)),
    *(
        setting(f"greedylore{r}", "Muon + GreedyLore", greedylore(r, 100), level=f"rank {r}")
        for r in (4, 16)
    ),
    setting(
        "greedylore16-every20", "Muon + GreedyLore", greedylore(16, 20), level="rank 16, every 20"
    ),
    setting("dion15", "Dion float32", dion(15, "float32"), level="15%"),
    *(setting(f"dion{p}-normal4", "Dion", dion(p, "normal4"), level=f"{p}%") for p in (5, 15)),
    *(
        setting(f"demo{k}", "DeMo", f"{DEMO} optimizer.lr=0.005 optimizer.k={k}", level=f"k={k}")
        for k in (32, 128)
    ),
    *grid("adamw", "optimizer=adamw", optimizer__lr=(0.002, 0.004, 0.008)),
    *grid("powersgd", f"{POWERSGD} optimizer.rank=16 {TUNED}", optimizer__lr=(0.01, 0.02, 0.04)),
    *grid("greedylore", greedylore(16, 100), optimizer__lr=(0.01, 0.02, 0.04)),
    *grid("dion", DION, optimizer__lr=(0.01, 0.02, 0.04), optimizer__lion_lr=(0.003, 0.01)),
    *grid("dion32", DION32, optimizer__lr=(0.02, 0.04), optimizer__mu=(0.95,)),
    *grid("dion32", DION32, optimizer__lr=(0.02, 0.04, 0.08), optimizer__mu=(0.8,)),
    *grid("demo", DEMO, optimizer__lr=(0.001, 0.003, 0.005, 0.01, 0.03)),
]
SETTINGS += [
    *(setting(f"local{h}", "local steps", local(h, dense(2))) for h in (10, 30, 60)),
    *(
        setting(
            f"local{h}-signs",
            "local steps",
            local(h, SIGNS, OUTER, HALF),
            of_seeds,
            level=f"every {h}",
        )
        for h, of_seeds in ((4, SEEDS), *((h, (0,)) for h in (1, 10, 30, 60, 120, 200, 300, 600)))
    ),
    setting("local120-60-signs", "local steps", local(SHORTER, SIGNS, OUTER, HALF), SEEDS),
    setting("local4-signs-decay8", "local steps", local(4, SIGNS, OUTER, "error_decay=0.8")),
    *(
        setting(
            f"local{name}-signs-message",
            "local steps",
            local(h, SIGNS_BY_MESSAGE, OUTER, HALF),
            of_seeds,
        )
        for name, h, of_seeds in (
            ("4", 4, SEEDS),
            ("60", 60, (0,)),
            ("120-60", SHORTER, SEEDS),
            ("200", 200, (0,)),
        )
    ),
    *(
        setting(
            f"local{name}-{kind}-embedding{bits}",
            "local steps",
            local(h, f"{OF_HIDDEN[kind]} {EMBEDDING_DENSE}=normal{bits}", OUTER, HALF),
        )
        for name, h, kind, bits in (
            *(("120-60", SHORTER, "message", bits) for bits in (2, 4)),
            *(("60", 60, "message", 4), ("4", 4, "message", 2)),
            *(("120-60", SHORTER, "normal1", bits) for bits in (2, 4)),
            ("200", 200, "normal1", 2),
        )
    ),
    setting("local60-top5", "local steps", local(60, top(5, "sign"), OUTER, HALF)),
    setting(
        "local30-chunks", "local steps", local(30, CHUNKS, "error_decay=0.95", "inner.lr=0.005")
    ),
    setting("local6-12", "local steps", local("{0:6,360:12}", dense(2), OUTER)),
    setting("local60-normal1", "local steps", local(60, dense(1))),
    setting("local60-normal1-decay5", "local steps", local(60, dense(1), HALF)),
    setting("local60-normal1-ef21", "local steps", local(60, dense(1), EF21)),
    setting("local30-top10", "local steps", local(30, top(10, "sign"))),
    setting("local30-top10-decay7", "local steps", local(30, top(10, "sign"), "error_decay=0.7")),
    setting("local30-top10-ef21", "local steps", local(30, top(10, "sign"), EF21)),
    setting("local4", "local steps", local(4, dense(2), OUTER)),
    setting("local30-normal4", "local steps", local(30, dense(4))),
    setting("local30-fitted30", "local steps", local(30, fitted(30), OUTER, HALF)),
    setting(
        "local30-roles", "local steps", local(30, f"{SIGNS} {EMBEDDING_DENSE}=normal2", OUTER, HALF)
    ),
    *(
        setting(
            f"{method.lower()}{ending}",
            method,
            f"{best} optimizer.sync_every={h}",
            level=f"every {h}",
        )
        for method, best in BEST_OF_PEERS.items()
        for h, ending in ((30, ""), (10, "-every10"))
    ),
    setting(  # of the three it ends lowest
        "muloco-every4",
        "MuLoCo",
        f"{BEST_OF_PEERS['MuLoCo']} optimizer.sync_every=4",
        level="every 4",
    ),
    setting(
        "muloco-4bits",
        "MuLoCo",
        f"{BEST_OF_PEERS['MuLoCo']} w2s.values=statistical4",
        level="every 30, 4 bits",
    ),
    setting("demo4", "DeMo", f"{DISTRO} optimizer.lr=0.005", level="k=4"),
    *grid("local5", local(5, dense(2), OUTER), optimizer__inner__momentum=(0.9, 0.8)),
    *grid("local5", local(5, dense(2), OUTER), norm__hidden__radius=(1.4,)),
    *grid("diloco", DILOCO, optimizer__outer_momentum=(0.3, 0.9)),
    *grid("muloco", MULOCO, optimizer__outer_momentum=(0.3, 0.8)),
    *grid("sparseloco", SPARSELOCO, optimizer__inner__lr=(0.004, 0.008)),
]
# Two gradients per batch, so that half the steps take as many.
MOMENTUM_SETTINGS = [
    setting(
        f"momentum/{kind}-{name}",
        "momentum",
        f"{message} optimizer.momentum_kind={kind} {TUNED} {GRID_STEPS}",
    )
    for name, message in (("identity", IDENTITY), ("fitted9", fitted(9)))
    for kind in ("polyak", "mvr", "hessian")
]
MOMENTUM_SETTINGS.append(
    setting(
        "momentum/mvr0.1-identity",
        "momentum",
        f"{IDENTITY} optimizer.momentum_kind=mvr optimizer.gamma=0.1 {TUNED} {GRID_STEPS}",
    )
)
# One worker, half the steps: what follows is of steps, and of signs of one momentum.
HALF_ALONE = f"{GRID_STEPS} {TUNED}"
FEEDBACK_RADII = (15, 60, 250, 1000)  # of hidden layers; steps with feedback are as gradients are
BEST_WITH_FEEDBACK = 1000  # of these, and with more seeds
FEEDBACK_SETTINGS = [
    alone("muon_feedback/without", "muon feedback", f"{IDENTITY} {HALF_ALONE}", SEEDS),
    *(
        alone(
            f"muon_feedback/with-radius{radius}",
            "muon feedback",
            f"{IDENTITY} {HALF_ALONE} +norm.hidden.lmo_feedback=true norm.hidden.radius={radius}",
            SEEDS if radius == BEST_WITH_FEEDBACK else (0,),
        )
        for radius in FEEDBACK_RADII
    ),
]
# Before the LMO and after it, with EF21 and without; of the embedding all is sent.
SIGN_SETTINGS = [
    alone(
        f"signs/{name}",
        "signs",
        f"{made_by} {ONE_SIGN} {HALF_ALONE}{shorter}",
        (0,) if shorter else SEEDS,
    )
    for name, made_by, shorter in (
        ("before-ef21", "", ""),
        ("before-none", "optimizer.feedback=none", ""),
        ("after-ef21", "optimizer=sign_muon optimizer.feedback=ef21", ""),
        ("after-none", "optimizer=sign_muon", ""),
        ("after-none-radius1", "optimizer=sign_muon", " norm.hidden.radius=1"),
    )
]
