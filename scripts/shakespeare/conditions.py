"""Points of both axes under other conditions: more workers, larger models, unlike text.

Each condition has an uncompressed run of its own. Those of sizes are in bfloat16, on a GPU that all
workers share or on CPUs, and their messages go through the host's memory.
"""

from dataclasses import replace

from scripts.shakespeare.settings import (
    DENSE_BACK,
    HALF,
    IDENTITY,
    OUTER,
    SETTINGS,
    SIGNS,
    TUNED,
    Setting,
    dense,
    local,
    setting,
)

SHARED_GPU = "transport=host compile=false checkpoint.every=0"
IN_HALF = "precision=bfloat16 compile=true transport=host"
OF_CONDITIONS = (
    *("identity", "served6", "local4-signs", "local10-signs", "local30-signs", "local60-signs"),
    "muloco",
)
POINTS = {one.name: " ".join(one.overrides) for one in SETTINGS if one.name in OF_CONDITIONS}

# More workers, who share the 16 sequences of a step.
MORE_WORKERS = (4, 8)
OF_WORKERS = ("identity", "served6", "local4-signs", "local10-signs", "local30-signs")
# What may help the most of them, whose batches are small, by what it changes.
REMEDIES = {
    "dense2": dense(2),
    "beta1": f"{SIGNS} optimizer.{OUTER} optimizer.{HALF} optimizer.inner.momentum=0.9",
    "beta4": f"{SIGNS} optimizer.outer_momentum=0.6 optimizer.{HALF} optimizer.inner.momentum=0.6",
    "outer6": f"{SIGNS} optimizer.outer_momentum=0.6 optimizer.{HALF}",
    "outer8": f"{SIGNS} optimizer.outer_momentum=0.8 optimizer.{HALF}",
    "radius1": f"{SIGNS} optimizer.{OUTER} optimizer.{HALF} norm.hidden.radius=1",
    "back": f"{SIGNS} optimizer.{OUTER} optimizer.{HALF} {DENSE_BACK}",
    "back6": f"{SIGNS} optimizer.outer_momentum=0.6 optimizer.{HALF} {DENSE_BACK}",
}
REMEDIES_EVERY = {  # so many steps per round
    2: ("back",),
    4: ("back", "back6"),
    10: ("dense2", "beta1", "outer6", "back", "back6"),
    30: ("dense2", "beta1", "beta4", "outer6", "outer8", "radius1"),
}


def of_workers(workers: int, name: str, overrides: str) -> Setting:
    """A setting with more workers than two."""
    return replace(setting(f"workers/{workers}-{name}", "workers", overrides), workers=workers)


def of_gpu(one: Setting) -> Setting:
    """The same on a GPU that all workers share."""
    return replace(one, overrides=(*one.overrides, *SHARED_GPU.split()), device="cuda")


WORKER_SETTINGS = [
    *(of_workers(n, name, POINTS[name]) for n in MORE_WORKERS for name in OF_WORKERS),
    *(
        of_workers(8, f"local{every}-{name}", local(every, REMEDIES[name]))
        for every, names in REMEDIES_EVERY.items()
        for name in names
    ),
]
# Of them three once more, to see what a GPU and its bfloat16 change.
GPU_SETTINGS = [
    of_gpu(of_workers(8, f"{name}-gpu", POINTS[name]))
    for name in ("identity", "local4-signs", "local30-signs")
]


# Layers, width, heads, and the steps of one token per parameter; a twelfth of them is between two
# evaluations.
SIZES = {
    "0.8M": (4, 128, 4, 204),
    "3M": (4, 256, 4, 780),
    "10M": (6, 384, 6, 2616),
}
MIDDLE = "3M"  # of it also whether radii transfer, and with more tokens per parameter
LONGER = 3  # tokens per parameter, of the smallest size those of the study itself
OF_LONGER = ("identity", "local4-signs", "local30-signs", "local60-signs")


def of_size(size: str, name: str, overrides: str, tokens: int = 1) -> Setting:
    """A setting in a model of this size, with so many tokens per parameter."""
    layers, width, heads, steps = SIZES[size]
    steps *= tokens
    model = f"model.layers={layers} model.width={width} model.heads={heads}"
    length = f"steps={steps} eval.every={steps // 12} log_every={steps // 12}"
    named = f"sizes/{size}-{tokens}-{name}"
    one = setting(named, "sizes", f"{overrides} {model} {length} {IN_HALF}")
    return replace(one, device="either")


SIZE_SETTINGS = [
    of_size(size, name, overrides)
    for size in SIZES
    for name, overrides in POINTS.items()
    if name != "local10-signs"
]
SIZE_SETTINGS += [
    of_size(MIDDLE, f"radius{radius}", f"{IDENTITY} {TUNED} norm.hidden.radius={radius}")
    for radius in (1, 4)
]
SIZE_SETTINGS += [of_size(MIDDLE, name, POINTS[name], LONGER) for name in OF_LONGER]
# Once more on CPUs, to see whether runs of either device can be compared.
ON_CPU = "cpu"
SIZE_SETTINGS.append(replace(of_size(MIDDLE, ON_CPU, POINTS["identity"]), device="cpu"))

# Histories to one worker and as much of comedies to the other, or both to both.
GENRES = ("apart", "mixed")
GENRE_SETTINGS = [
    setting(
        f"genres/{genres}-{name}",
        "genres",
        f"{overrides} data.train=data/shakespeare_genres/{genres}_train_*.bin",
    )
    for genres in GENRES
    for name, overrides in POINTS.items()
    if name in ("identity", "local4-signs", "local30-signs")
]
