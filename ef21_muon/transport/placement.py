"""Which rank is the server of which layer."""

PLACEMENTS = ("rank0", "sharded", "replicated")
AUTO = "auto"  # the placement that takes the least time


def assign(costs: list[int], ranks: int) -> list[int]:
    """A rank for each layer: by decreasing cost, each to the rank with the least so far (LPT).

    costs: what the LMO of each layer takes, in multiplications.
    """
    load, owners = [0] * ranks, [0] * len(costs)
    for layer in sorted(range(len(costs)), key=lambda layer: -costs[layer]):
        owner = min(range(ranks), key=load.__getitem__)
        owners[layer] = owner
        load[owner] += costs[layer]
    return owners


def owned_layers(assigned: list[int], server: str, ranks: int) -> list[slice]:
    """The layers of a batch that each rank owns, by placement.

    assigned: the rank that `assign` chose for each layer, in increasing order. `rank0`: rank 0 owns
    all; `sharded`: as assigned; `replicated`: every rank owns all. Raises ValueError for another
    name.
    """
    if server not in PLACEMENTS:
        names = ", ".join((AUTO, *PLACEMENTS))
        raise ValueError(f"server={server!r} is not a placement: choose {names}")
    layers = len(assigned)
    if server == "replicated":
        return [slice(0, layers)] * ranks
    if server == "rank0":
        return [slice(0, layers)] + [slice(layers, layers)] * (ranks - 1)
    bounds = [sum(owner < rank for owner in assigned) for rank in range(ranks + 1)]
    return [slice(*bounds[rank : rank + 2]) for rank in range(ranks)]


def cut(sizes: list[int], parts: int) -> list[range]:
    """Cut a sequence into at most `parts` runs, each with about the same sum of sizes."""
    ends, total, done = [], sum(sizes), 0
    for place, size in enumerate(sizes, 1):
        done += size
        if done * parts >= total * (len(ends) + 1):
            ends.append(place)
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
