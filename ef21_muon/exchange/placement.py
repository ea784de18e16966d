"""Which rank is the server of which layer."""

PLACEMENTS = ("rank0", "sharded", "replicated")
AUTO = "auto"  # the placement of the least traffic


def spread(costs: list[int], ranks: int) -> list[int]:
    """A rank for each layer: dealt out by decreasing cost, each to the rank with the least so far.

    costs: what the LMO of each layer takes, in multiplications.
    """
    load = [0] * ranks
    owners = [0] * len(costs)
    for layer in sorted(range(len(costs)), key=lambda layer: -costs[layer]):
        owner = min(range(ranks), key=load.__getitem__)
        owners[layer] = owner
        load[owner] += costs[layer]
    return owners


def owned_layers(spread_over: list[int], server: str, ranks: int) -> list[slice]:
    """The layers of a batch that each rank owns, by placement.

    spread_over: the rank that `spread` chose for each layer, in increasing order. `rank0`: rank 0
    owns all; `sharded`: as spread; `replicated`: every rank owns all. Raises ValueError for another
    name.
    """
    if server not in PLACEMENTS:
        names = ", ".join((AUTO, *PLACEMENTS))
        raise ValueError(f"server={server!r} is not a placement: choose {names}")
    layers = len(spread_over)
    if server == "replicated":
        return [slice(0, layers)] * ranks
    if server == "rank0":
        return [slice(0, layers)] + [slice(layers, layers)] * (ranks - 1)
    bounds = [sum(owner < rank for owner in spread_over) for rank in range(ranks + 1)]
    return [slice(*bounds[rank : rank + 2]) for rank in range(ranks)]


def busiest(w2s: list[int], s2w: list[int], spread_over: list[int], ranks: int) -> dict[str, int]:
    """By placement the bytes that the busiest rank sends or receives in a round, whichever is more.

    w2s, s2w: of every layer the bytes of a message to its server and back; spread_over: the rank
    that `spread` chose for it.
    """
    others, up, down = ranks - 1, sum(w2s), sum(s2w)
    sharded = 0
    for rank in range(ranks):
        own = [layer for layer, owner in enumerate(spread_over) if owner == rank]
        to_own, of_own = sum(w2s[layer] for layer in own), sum(s2w[layer] for layer in own)
        sends, receives = up - to_own + others * of_own, others * to_own + down - of_own
        sharded = max(sharded, sends, receives)
    return {
        "sharded": sharded,
        "replicated": others * up,
        "rank0": others * max(up, down),
    }


def cut(sizes: list[int], parts: int) -> list[range]:
    """Cut a sequence into at most `parts` runs, each with about the same sum of sizes."""
    ends, total, done = [], sum(sizes), 0
    for place, size in enumerate(sizes, 1):
        done += size
        if done * parts >= total * (len(ends) + 1):
            ends.append(place)
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
