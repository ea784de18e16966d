"""The runs of the study: a row per setting, in a list for each file of results/shakespeare/logs.

To add a method, add a row to a list of STUDY below: a name, the family and the level that figures
and tables show, overrides of `experiment=shakespeare`, and its seeds if they are more than seed 0.
Then run.py trains it, and figures.py has it in its figures and in the table of all settings. What
is not ours belongs to "baselines" or "peers"; its family also gets a line in METHODS of results.py.

The uncompressed run is tuned by a grid, on half the steps; the best radii and momentum, TUNED, hold
for everything else that takes its step, as in the paper. Other baselines have grids of their own.
"""

from dataclasses import dataclass

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone. Their loss gap is to the setting `baseline`."""

    name: str
    family: str
    overrides: str
    level: str = ""
    seeds: tuple[int, ...] = (0,)
    workers: int = 2
    device: str = "cpu"  # or "cuda", or "either"
    baseline: str = "identity"


# What is sent to the servers, and back.
IDENTITY, SIGNS = "compressor@w2s=identity", "compressor@w2s=sign"
QUANTIZE = "compressor@w2s=quantize w2s.values"
DENSE_BACK = "compressor@s2w=sign s2w.values=normal2"
FITTED_BACK = "compressor@s2w=quantized_rank s2w.fraction=0.12"
SIGNS_BACK = f"{SIGNS} {DENSE_BACK}"
ON_GPU = "transport=host compile=false checkpoint.every=0"
OF_EMBEDDING = "+compressor@norm.embedding.w2s"
RANK_OF_EMBEDDING = f"{OF_EMBEDDING}=quantized_rank norm.embedding.w2s.fraction"
# A scale per layer; in the embedding one per row, as bytes differ in how often they come.
SIGN_A_LAYER = f"{SIGNS} w2s.values=sign@tensor"
SIGNS_BY_MESSAGE = f"{SIGN_A_LAYER} {OF_EMBEDDING}=sign"
ONE_SIGN = f"{SIGN_A_LAYER} {OF_EMBEDDING}=identity"
ROTATED = f"{QUANTIZE}=normal1@tensor"
INT5 = "{format:int5,rounding:nearest}"  # a scale per row


def part(compressor: str, percent: float, values: str) -> str:
    return f"compressor@w2s={compressor} w2s.fraction={percent / 100:g} w2s.values={values}"


def fitted(percent: float) -> str:
    return f"compressor@w2s=quantized_rank w2s.fraction={percent / 100:g}"


def dense(bits: int) -> str:
    return f"{QUANTIZE}=normal{bits}"


def with_embedding(hidden: str, bits: int) -> str:
    return f"{hidden} {OF_EMBEDDING}=quantize norm.embedding.w2s.values=normal{bits}"


# Methods.
SYNC, DECAY, INNER = "optimizer.sync_every", "optimizer.error_decay", "optimizer.inner"
OUTER, OUTER6, OUTER8 = (f"optimizer.outer_momentum={momentum}" for momentum in (0.3, 0.6, 0.8))
HALF, EF21 = f"{DECAY}=0.5", "optimizer.feedback=ef21"
LR, LION_LR, MOMENTUM = "optimizer.lr", "optimizer.lion_lr", "optimizer.momentum"
HIDDEN, EMBEDDING = "norm.hidden.radius", "norm.embedding.radius"
KIND, HALF_STEPS = f"{MOMENTUM}_kind", "steps=300"
RADII = f"{HIDDEN}=2 {EMBEDDING}=60"
TUNED, SLOW = f"{RADII} {MOMENTUM}=0.8", f"{MOMENTUM}=0.9"
POWERSGD = "optimizer=muon_powersgd checkpoint.every=0"  # torch keeps its state to itself
DION = "optimizer=dion optimizer.values=natural optimizer.weight_decay=0"
DION32 = "optimizer=dion optimizer.lion_lr=0.01 optimizer.weight_decay=0"  # float32 factors
BEST_DION = f"{DION32} {LR}=0.04 optimizer.mu=0.8 optimizer.rank_fraction"
DEMO = "optimizer=demo optimizer.values=int8"
DISTRO = "optimizer=demo optimizer.values=sign optimizer.k=4"  # 0.02 bits per parameter and step
DILOCO = f"optimizer=diloco {SYNC}=30 optimizer.inner.lr=0.004"
MULOCO = f"optimizer=muloco {HIDDEN}=2 w2s.values=statistical2 optimizer.inner.others.lr=0.004"
SPARSELOCO = "optimizer=sparseloco optimizer.mean=all"  # made before there was another mean
BEST_DILOCO, BEST_MULOCO = f"{DILOCO} {OUTER}", f"{MULOCO} {OUTER}"
BEST_SPARSELOCO = f"{SPARSELOCO} optimizer.inner.lr=0.004"
# Rounds that get shorter as the lr falls, which it does from 60 % of the steps on.
SCHEDULES = {"120-60": "{0:120,360:60}", "6-12": "{0:6,360:12}"}


def greedylore(rank: int, every: int) -> str:
    return f"optimizer=muon_greedylore optimizer.rank={rank} optimizer.refresh_every={every}"


def served(percent: float, of_embedding: float) -> str:
    """Momentum at the server, and a rank of its own for the embedding."""
    return (
        f"{fitted(percent)} {RANK_OF_EMBEDDING}={of_embedding / 100:g} optimizer.feedback=ef14 "
        f"optimizer.momentum=0 optimizer.server_momentum=0.7 optimizer.error_decay=0.92 {RADII}"
    )


def local(every: int | str, message: str, *options: str) -> str:
    """Scion's steps on every worker, with the uncompressed run's radii and momentum."""
    sync = f"{SYNC}={SCHEDULES.get(str(every), every)}"
    return " ".join([f"optimizer=local {HIDDEN}=2", sync, message, *options])


# Rows.
def tuned(name: str, family: str, overrides: str, level: str = "", seeds=(0,)) -> Setting:
    """With the uncompressed run's radii and momentum."""
    return Setting(name, family, f"{overrides} {TUNED}", level, seeds)


def levels(family: str, compressor: str, values: str, *percents: int, seeds=(0,)) -> list[Setting]:
    """A compressor at several percentages, by names such as rank5-int5."""
    kind, *ending = family.split()
    names = {"-".join([f"{kind}{p}", *ending]): p for p in percents}
    return [
        tuned(name, family, part(compressor, p, values), f"{p}%", seeds)
        for name, p in names.items()
    ]


def rounds(every: int | str, ending: str, message: str, *options: str, seeds=(0,)) -> Setting:
    """Ours with a sync every so many steps."""
    level = f"every {every}" if ending == "-signs" and every not in SCHEDULES else ""
    overrides = local(every, message, *options)
    return Setting(f"local{every}{ending}", "local steps", overrides, level, seeds)


def of_momentum(name: str, overrides: str) -> Setting:
    """In half the steps, as most kinds take two gradients per batch; over Polyak's momentum."""
    baseline = f"momentum/polyak-{name.rpartition('-')[2]}"
    overrides = f"{overrides} {TUNED} {HALF_STEPS}"
    return Setting(f"momentum/{name}", "momentum", overrides, baseline=baseline)


def alone(name: str, overrides: str, seeds: tuple[int, ...] = SEEDS) -> Setting:
    """Of one worker, which has the whole batch, in half the steps; over Muon."""
    family, baseline = name.partition("/")[0].replace("_", " "), "muon_feedback/without"
    overrides = f"{HALF_STEPS} {TUNED} {overrides}"
    return Setting(name, family, overrides, seeds=seeds, workers=1, baseline=baseline)


def under(condition: str, name: str, *overrides: str, **more) -> Setting:
    """Under another condition, which has an uncompressed run of its own."""
    family, baseline = condition.partition("/")[0], f"{condition}-identity"
    return Setting(f"{condition}-{name}", family, " ".join(overrides), baseline=baseline, **more)


def grid(name: str, overrides: str, key: str, *values: float) -> list[Setting]:
    """Half the steps with each value of a key: {0} in the name, and {1} for 1 - value."""
    return [
        Setting(f"grid/{name.format(v, 1 - v)}", "grid", f"{overrides} {HALF_STEPS} {key}={v:g}")
        for v in values
    ]


QUANTIZED, SERVER = "quantized rank", "quantized rank, server momentum"
STUDY = {
    "identity": [tuned("identity", "identity", IDENTITY, seeds=SEEDS)],
    "quantized_rank": [
        tuned("fitted4", QUANTIZED, fitted(4), "4%"),
        tuned("fitted9", QUANTIZED, fitted(9), "9%", SEEDS),
        tuned("fitted12", QUANTIZED, fitted(12), "12%", SEEDS),
        tuned("fitted30", QUANTIZED, fitted(30), "30%"),
        tuned("fitted12-embedding", "embedding apart", f"{fitted(12)} {RANK_OF_EMBEDDING}=0.25"),
        Setting("served3", SERVER, served(3, 10), "3%", SEEDS),
        Setting("served5", SERVER, served(5, 16), "5%"),
        Setting("served6", SERVER, served(6, 20), "6%", SEEDS),
        Setting("served12", SERVER, served(12, 25), "12%", SEEDS),
    ],
    "rank": [
        *levels("rank int5", "rank", INT5, 5, 10, 30),
        *levels("rank int5", "rank", INT5, 40, seeds=SEEDS),
        *levels("singular int5", "top_singular", INT5, 10),
        *levels("rank", "rank", "float32", 5, 10, 15, 20),
        *levels("rank natural", "rank", "natural", 5, 10, 15),
        *levels("rank natural4", "rank", "natural4", 5, 10, 15),
    ],
    "top": [
        *levels("top", "topk", "float32", 5, 10, 15, 20),
        *levels("top natural", "topk", "natural", 5, 15),
        *levels("top natural4", "topk", "natural4", 5, 15),
    ],
    "quantize": [
        tuned("natural", "natural", "compressor@w2s=natural"),
        tuned("sign", "sign", SIGNS),
        tuned("int4-message", "int4", f"{QUANTIZE}=int4@tensor", "one block"),
        tuned("int4-112", "int4", f"{QUANTIZE}=int4@112", "blocks of 112"),
        tuned("smooth4", "int4", f"{QUANTIZE}=rowcol4", "rows and columns"),
    ],
    "feedback": [
        tuned("rank5-ef14", "feedback", f"{part('rank', 5, 'float32')} optimizer.feedback=ef14"),
        tuned("rank5-none", "feedback", f"{part('rank', 5, 'float32')} optimizer.feedback=none"),
        tuned("top5-ef14", "feedback", f"{part('topk', 5, 'float32')} optimizer.feedback=ef14"),
        tuned("top5-none", "feedback", f"{part('topk', 5, 'float32')} optimizer.feedback=none"),
    ],
    "both_ways": [
        tuned("fitted12-both", "both ways", f"{fitted(12)} {FITTED_BACK}", "low rank back"),
        tuned("fitted12-dense", "both ways", f"{fitted(12)} {DENSE_BACK}", "2 bits back"),
        Setting("served6-both", "both ways", f"{served(6, 20)} {DENSE_BACK}", "6%, 2 bits back"),
    ],
    "baselines": [
        tuned("muon", "Muon", "optimizer=muon"),
        Setting("adamw", "AdamW", "optimizer=adamw optimizer.lr=0.004"),
        tuned("powersgd4", "Muon + PowerSGD", f"{POWERSGD} optimizer.rank=4", "rank 4"),
        tuned("powersgd16", "Muon + PowerSGD", f"{POWERSGD} optimizer.rank=16", "rank 16"),
        tuned("greedylore4", "Muon + GreedyLore", greedylore(4, 100), "rank 4"),
        tuned("greedylore16", "Muon + GreedyLore", greedylore(16, 100), "rank 16"),
        tuned("greedylore16-every20", "Muon + GreedyLore", greedylore(16, 20), "rank 16, every 20"),
        Setting("dion15", "Dion float32", f"{BEST_DION}=0.15 optimizer.values=float32", "15%"),
        Setting("dion5-normal4", "Dion", f"{BEST_DION}=0.05 optimizer.values=normal4", "5%"),
        Setting("dion15-normal4", "Dion", f"{BEST_DION}=0.15 optimizer.values=normal4", "15%"),
        Setting("demo32", "DeMo", f"{DEMO} optimizer.lr=0.005 optimizer.k=32", "k=32"),
        Setting("demo128", "DeMo", f"{DEMO} optimizer.lr=0.005 optimizer.k=128", "k=128"),
    ],
    "local_steps": [
        *(rounds(every, "", dense(2)) for every in (10, 30, 60)),
        rounds(4, "-signs", SIGNS, OUTER, HALF, seeds=SEEDS),
        *(rounds(h, "-signs", SIGNS, OUTER, HALF) for h in (1, 10, 30, 60, 120, 200, 300, 600)),
        rounds("120-60", "-signs", SIGNS, OUTER, HALF, seeds=SEEDS),
        rounds(4, "-signs-decay8", SIGNS, OUTER, f"{DECAY}=0.8"),
        rounds(4, "-signs-message", SIGNS_BY_MESSAGE, OUTER, HALF, seeds=SEEDS),
        rounds(60, "-signs-message", SIGNS_BY_MESSAGE, OUTER, HALF),
        rounds("120-60", "-signs-message", SIGNS_BY_MESSAGE, OUTER, HALF, seeds=SEEDS),
        rounds(200, "-signs-message", SIGNS_BY_MESSAGE, OUTER, HALF),
        rounds("120-60", "-message-embedding2", with_embedding(SIGN_A_LAYER, 2), OUTER, HALF),
        rounds("120-60", "-message-embedding4", with_embedding(SIGN_A_LAYER, 4), OUTER, HALF),
        rounds(60, "-message-embedding4", with_embedding(SIGN_A_LAYER, 4), OUTER, HALF),
        rounds(4, "-message-embedding2", with_embedding(SIGN_A_LAYER, 2), OUTER, HALF),
        rounds("120-60", "-normal1-embedding2", with_embedding(ROTATED, 2), OUTER, HALF),
        rounds("120-60", "-normal1-embedding4", with_embedding(ROTATED, 4), OUTER, HALF),
        rounds(200, "-normal1-embedding2", with_embedding(ROTATED, 2), OUTER, HALF),
        rounds(60, "-top5", part("topk", 5, "sign"), OUTER, HALF),
        rounds(30, "-chunks", "compressor@w2s=chunk_topk", f"{DECAY}=0.95 {INNER}.lr=0.005"),
        rounds("6-12", "", dense(2), OUTER),
        rounds(60, "-normal1", dense(1)),
        rounds(60, "-normal1-decay5", dense(1), HALF),
        rounds(60, "-normal1-ef21", dense(1), EF21),
        rounds(30, "-top10", part("topk", 10, "sign")),
        rounds(30, "-top10-decay7", part("topk", 10, "sign"), f"{DECAY}=0.7"),
        rounds(30, "-top10-ef21", part("topk", 10, "sign"), EF21),
        rounds(4, "", dense(2), OUTER),
        rounds(30, "-normal4", dense(4)),
        rounds(30, "-fitted30", fitted(30), OUTER, HALF),
        rounds(30, "-roles", with_embedding(SIGNS, 2), OUTER, HALF),
    ],
    "peers": [
        Setting("diloco", "DiLoCo", f"{BEST_DILOCO} {SYNC}=30", "every 30"),
        Setting("diloco-every10", "DiLoCo", f"{BEST_DILOCO} {SYNC}=10", "every 10"),
        Setting("muloco", "MuLoCo", f"{BEST_MULOCO} {SYNC}=30", "every 30"),
        Setting("muloco-every10", "MuLoCo", f"{BEST_MULOCO} {SYNC}=10", "every 10"),
        Setting("sparseloco", "SparseLoCo", f"{BEST_SPARSELOCO} {SYNC}=30", "every 30"),
        Setting("sparseloco-every10", "SparseLoCo", f"{BEST_SPARSELOCO} {SYNC}=10", "every 10"),
        Setting("muloco-every4", "MuLoCo", f"{BEST_MULOCO} {SYNC}=4", "every 4"),
        Setting(
            "muloco-4bits", "MuLoCo", f"{BEST_MULOCO} w2s.values=statistical4", "every 30, 4 bits"
        ),
        Setting("demo4", "DeMo", f"{DISTRO} optimizer.lr=0.005", "k=4"),
    ],
}
POINTS = {one.name: one.overrides for several in STUDY.values() for one in several}
STUDY["grid"] = [
    # Of the uncompressed run a cross, each tuned with the others at their first choice, and then
    # the best of each arm together.
    *grid("identity-hidden{0:g}", f"{IDENTITY} {EMBEDDING}=60 {SLOW}", HIDDEN, 0.5, 1, 2, 4),
    *grid("identity-embedding{0:g}", f"{IDENTITY} {HIDDEN}=1 {SLOW}", EMBEDDING, 30, 120),
    *grid("identity-beta{1:g}", f"{IDENTITY} {HIDDEN}=1 {EMBEDDING}=60", MOMENTUM, 0.95, 0.8, 0.6),
    *grid("identity-hidden2-beta{1:g}", f"{IDENTITY} {RADII}", MOMENTUM, 0.8),
    *grid("fitted4-hidden2-beta{1:g}", f"{fitted(4)} {RADII}", MOMENTUM, 0.95, 0.9, 0.8, 0.6, 0.2),
    *grid("fitted4-hidden1-beta{1:g}", f"{fitted(4)} {HIDDEN}=1 {EMBEDDING}=60", MOMENTUM, 0.9),
    *grid("fitted4-steps{0:g}", f"{fitted(4)} {TUNED}", "norm.hidden.norm.steps", 2, 3),
    *grid("served3-decay{0:g}", served(3, 10), DECAY, 0.8, 0.92, 0.97),
    *grid("adamw-lr{0:g}", "optimizer=adamw", LR, 0.002, 0.004, 0.008),
    *grid("powersgd-lr{0:g}", f"{POWERSGD} optimizer.rank=16 {TUNED}", LR, 0.01, 0.02, 0.04),
    *grid("greedylore-lr{0:g}", f"{greedylore(16, 100)} {TUNED}", LR, 0.01, 0.02, 0.04),
    *grid("dion-lr0.01-lion_lr{0:g}", f"{DION} {LR}=0.01", LION_LR, 0.003, 0.01),
    *grid("dion-lr0.02-lion_lr{0:g}", f"{DION} {LR}=0.02", LION_LR, 0.003, 0.01),
    *grid("dion-lr0.04-lion_lr{0:g}", f"{DION} {LR}=0.04", LION_LR, 0.003, 0.01),
    *grid("dion32-lr{0:g}-mu0.95", f"{DION32} optimizer.mu=0.95", LR, 0.02, 0.04),
    *grid("dion32-lr{0:g}-mu0.8", f"{DION32} optimizer.mu=0.8", LR, 0.02, 0.04, 0.08),
    *grid("demo-lr{0:g}", DEMO, LR, 0.001, 0.003, 0.005, 0.01, 0.03),
    *grid("local5-beta{1:g}", local(5, dense(2), OUTER), f"{INNER}.momentum", 0.9, 0.8),
    *grid("local5-hidden{0:g}", local(5, dense(2), OUTER), HIDDEN, 1.4),
    *grid("diloco-outer_momentum{0:g}", DILOCO, "optimizer.outer_momentum", 0.3, 0.9),
    *grid("muloco-outer_momentum{0:g}", MULOCO, "optimizer.outer_momentum", 0.3, 0.8),
    *grid("sparseloco-lr{0:g}", SPARSELOCO, "optimizer.inner.lr", 0.004, 0.008),
]
STUDY["momentum"] = [
    of_momentum("polyak-identity", f"{IDENTITY} {KIND}=polyak"),
    of_momentum("mvr-identity", f"{IDENTITY} {KIND}=mvr"),
    of_momentum("mvr0.1-identity", f"{IDENTITY} {KIND}=mvr optimizer.gamma=0.1"),
    of_momentum("hessian-identity", f"{IDENTITY} {KIND}=hessian"),
    of_momentum("polyak-fitted9", f"{fitted(9)} {KIND}=polyak"),
    of_momentum("mvr-fitted9", f"{fitted(9)} {KIND}=mvr"),
    of_momentum("hessian-fitted9", f"{fitted(9)} {KIND}=hessian"),
]
# One worker: of hidden layers' steps with feedback, which are as long as gradients are; and of
# signs before the LMO and after it, with EF21 and without, while of the embedding all is sent.
WITH_FEEDBACK = f"{IDENTITY} +norm.hidden.lmo_feedback=true {HIDDEN}"
STUDY["muon_feedback"] = [
    alone("muon_feedback/without", IDENTITY),
    alone("muon_feedback/with-radius15", f"{WITH_FEEDBACK}=15", seeds=(0,)),
    alone("muon_feedback/with-radius60", f"{WITH_FEEDBACK}=60", seeds=(0,)),
    alone("muon_feedback/with-radius250", f"{WITH_FEEDBACK}=250", seeds=(0,)),
    alone("muon_feedback/with-radius1000", f"{WITH_FEEDBACK}=1000"),
]
STUDY["signs"] = [
    alone("signs/before-ef21", ONE_SIGN),
    alone("signs/before-none", f"{ONE_SIGN} optimizer.feedback=none"),
    alone("signs/after-ef21", f"{ONE_SIGN} optimizer=sign_muon optimizer.feedback=ef21"),
    alone("signs/after-none", f"{ONE_SIGN} optimizer=sign_muon"),
    alone("signs/after-none-radius1", f"{ONE_SIGN} optimizer=sign_muon {HIDDEN}=1", seeds=(0,)),
]

# More workers, who share the 16 sequences of a step, and what may help the most of them, whose
# batches are small.
OF_WORKERS = ("identity", "served6", "local4-signs", "local10-signs", "local30-signs")
STUDY["workers"] = [
    *(under(f"workers/{n}", name, POINTS[name], workers=n) for n in (4, 8) for name in OF_WORKERS),
    *(
        under("workers/8", f"local{every}-{name}", local(every, *options), workers=8)
        for every, name, *options in (
            (2, "back", SIGNS_BACK, OUTER, HALF),
            (4, "back", SIGNS_BACK, OUTER, HALF),
            (4, "back6", SIGNS_BACK, OUTER6, HALF),
            (10, "dense2", dense(2)),
            (10, "beta1", SIGNS, OUTER, HALF, f"{INNER}.momentum=0.9"),
            (10, "outer6", SIGNS, OUTER6, HALF),
            (10, "back", SIGNS_BACK, OUTER, HALF),
            (10, "back6", SIGNS_BACK, OUTER6, HALF),
            (30, "dense2", dense(2)),
            (30, "beta1", SIGNS, OUTER, HALF, f"{INNER}.momentum=0.9"),
            (30, "beta4", SIGNS, OUTER6, HALF, f"{INNER}.momentum=0.6"),
            (30, "outer6", SIGNS, OUTER6, HALF),
            (30, "outer8", SIGNS, OUTER8, HALF),
            (30, "radius1", f"{SIGNS} {HIDDEN}=1", OUTER, HALF),
        )
    ),
    *(  # once more, to see what a GPU that they share and its bfloat16 change
        under("workers/8", f"{name}-gpu", POINTS[name], ON_GPU, workers=8, device="cuda")
        for name in ("identity", "local4-signs", "local30-signs")
    ),
]

# Larger models, in bfloat16, on a GPU that all workers share or on CPUs; messages go through the
# host's memory. Layers, width, heads, and the steps of one token per parameter.
SIZES = {"0.8M": (4, 128, 4, 204), "3M": (4, 256, 4, 780), "10M": (6, 384, 6, 2616)}
OF_SIZES = ("identity", "served6", "local4-signs", "local30-signs", "local60-signs", "muloco")
OF_LONGER = ("identity", "local4-signs", "local30-signs", "local60-signs")


def of_size(size: str, name: str, *overrides: str, tokens: int = 1, device="either") -> Setting:
    """In a model of this size, with so many tokens per parameter."""
    layers, width, heads, steps = SIZES[size]
    model = f"model.layers={layers} model.width={width} model.heads={heads} steps={tokens * steps}"
    looks = tokens * steps // 12
    often = f"eval.every={looks} log_every={looks} precision=bfloat16 compile=true transport=host"
    return under(f"sizes/{size}-{tokens}", name, *overrides, model, often, device=device)


STUDY["sizes"] = [
    *(of_size(size, name, POINTS[name]) for size in SIZES for name in OF_SIZES),
    of_size("3M", "radius1", POINTS["identity"], f"{HIDDEN}=1"),
    of_size("3M", "radius4", POINTS["identity"], f"{HIDDEN}=4"),
    *(of_size("3M", name, POINTS[name], tokens=3) for name in OF_LONGER),
    of_size("3M", "cpu", POINTS["identity"], device="cpu"),  # can both devices be compared?
]
# Histories to one worker and as much of comedies to the other, or both to both.
GENRES = "data.train=data/shakespeare_genres"
STUDY["genres"] = [
    under(f"genres/{genres}", name, POINTS[name], f"{GENRES}/{genres}_train_*.bin")
    for genres in ("apart", "mixed")
    for name in ("identity", "local4-signs", "local30-signs")
]
SETTINGS = {one.name: one for settings in STUDY.values() for one in settings}
