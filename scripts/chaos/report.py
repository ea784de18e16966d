"""results/chaos/README.md, from the records of a chaos run alone."""

from statistics import mean

from scripts.chaos.faults import bound


def report(records: list[dict], link: list[dict], cost: list[dict]) -> tuple[str, bool]:
    """What happened in sentences, and a table; and whether all held that is asked for.

    link, cost: the records of link.py and cost.py.
    """
    first = records[0]
    faults, rounds, calm = (
        [one for one in records if one["record"] == kind] for kind in ("fault", "round", "calm")
    )
    equal = all(one["equal_at_the_end"] and not one["rounds_with_two_histories"] for one in rounds)
    promises = [promised(place, faults, first["pace"]) for place in range(len(faults))]
    waits = [one["longest_wait"] for one in faults]
    in_time = all(wait <= most for wait, most in zip(waits, promises, strict=True))
    losses, without = ([one["test_loss"] for one in some] for some in (rounds, calm))
    among = bool(losses) and min(without) <= mean(losses) <= max(without)
    kinds = sorted({one["kind"] for one in faults})
    text = [
        "# Chaos\n",
        f"`python scripts/chaos/run.py --seed {first['seed']}`: {len(faults)} faults of "
        f"{len(kinds)} kinds in {len(rounds)} runs of {first['workers']} workers that come and go, "
        f"{sum(one['seconds'] for one in rounds) / 60:.0f} minutes.\n",
        f"- W is the same on all workers, bit for bit, before every one of "
        f"{sum(one['rounds_seen'] for one in rounds):,} rounds and at the end: {_answer(equal)}.",
        f"- No worker to which nothing happened waited longer than promised: {_answer(in_time)}.",
        f"- The mean test loss, {_losses(losses)}, lies among those of as many runs without "
        f"faults with the same tokens, {_losses(without)} ({len(calm)} seeds): {_answer(among)}.\n",
        "| fault | times | longest wait of others, s | promised, s | all are back after, s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind in kinds:
        of_kind = [one for one in faults if one["kind"] == kind]
        backs = [one["back_after_seconds"] for one in of_kind if one["back_after_seconds"]]
        cells = [kind, len(of_kind), f"{max(one['longest_wait'] for one in of_kind):.1f}"]
        most = [m for one, m in zip(faults, promises, strict=True) if one["kind"] == kind]
        cells.append(f"{min(most):.0f}" + (f" to {max(most):.0f}" if min(most) < max(most) else ""))
        cells.append(f"{mean(backs):.1f}" if backs else "-")
        text.append(f"| {' | '.join(map(str, cells))} |")
    text += [
        "",
        "| seed | tokens | test loss | steps without faults | tokens | test loss |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one, other in zip(rounds, calm, strict=False):
        left = f"{one['seed']} | {one['tokens']:,} | {one['test_loss']:.4f}"
        right = f"{other['steps']:,} | {other['tokens']:,} | {other['test_loss']:.4f}"
        text.append(f"| {left} | {right} |")
    text += [
        "",
        f"A step takes {first['pace']:g} s at least, so that {first['workers']} machines fit on "
        "one. `kill`: SIGKILL; `lose`: with its torchrun, back later; `preempt`: SIGTERM, back "
        "later; `stop`: SIGSTOP, later SIGCONT; `hang`: in Python, while it says that it lives; "
        "`part`: its W becomes another; `lighthouse`: away for a while.",
        "",
    ]
    text += [*_link(link), *_cost(cost)]
    return "\n".join(text), equal and in_time and among


def promised(place: int, faults: list[dict], pace: float) -> float:
    """Seconds that others wait at most for a fault.

    One that hangs ends itself by its longest step, which is as long as it stood still in one.
    """
    fault = faults[place]
    stood_still = [
        one["lasts"]
        for one in faults[:place]
        if one["kind"] == "stop"
        and (one["round"], one["worker"]) == (fault["round"], fault["worker"])
    ]
    return bound(fault["kind"], fault["lasts"], pace + max(stood_still, default=0.0))


def _link(records: list[dict]) -> list[str]:
    if not records:
        return []
    first, *faults, end = records
    outages = [
        f"- for {one['lasts']} s: {one['rounds_without']} rounds without it, the others waited for "
        f"{one['longest_wait']:.1f} s at most, and all met {one['back_after_seconds']:.1f} s after "
        "it was cut off;"
        for one in faults
    ]
    equal = end["equal_at_the_end"] and not end["rounds_with_two_histories"]
    return [
        "## Over slow links\n",
        f"`sudo python scripts/chaos/link.py`: {first['workers']} workers on nodes of their own, "
        f"{first['rate']} with {first['delay']} one way, one of them cut off twice:\n",
        *outages,
        f"- the same W on all, in {end['rounds_seen']} rounds and at the end: {_answer(equal)}.",
        "",
    ]


def _cost(records: list[dict]) -> list[str]:
    if not records:
        return []
    pairs = ", ".join(f"{one['fixed']:.1f} and {one['torchft']:.1f}" for one in records)
    more = mean(one["torchft"] - one["fixed"] for one in records)
    return [
        "## When nothing happens\n",
        "`python scripts/chaos/cost.py`: a step with a round, of three processes on two cores, "
        f"takes with fixed membership and with torchft's {pairs} ms (medians in turns, on a "
        f"busy machine): {more:+.1f} ms in the mean.",
        "",
    ]


def _answer(holds: bool) -> str:
    return f"**{'yes' if holds else 'NO'}**"


def _losses(losses: list[float]) -> str:
    return f"{mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})" if losses else "none"
