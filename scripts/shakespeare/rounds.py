"""Both axes of the study: bits a message, and messages a step; bytes sent and received."""

from statistics import mean

from scripts.shakespeare.envelopes import ahead, fewest_both_ways
from scripts.shakespeare.findings import filled
from scripts.shakespeare.results import LOCAL, PEERS, TARGET_SHARE, Result, lowest, ours
from training.drawing import Figure
from training.picture import line_look, ticks_alone

FEWER = 100  # times, of what ends closest to the uncompressed run
OF_ROUNDS = (*LOCAL, *PEERS)
LINES = {  # of the picture: a message, and the settings that send it
    "signs of all entries": [f"local{every}-signs" for every in (1, 4, 10, 30, 60, 120)],
    "every entry in 2 bits": [f"local{every}" for every in (4, 10, 30, 60)],
    "MuLoCo, 2 bits": ["muloco-every10", "muloco"],
    "fitted rank 6 %, momentum at the server": ["served6"],
    "Muon, PowerSGD rank 16": ["powersgd16"],
    "everything": ["identity"],
}


def all_of(result: Result) -> float:
    """Sizes sent and received in the whole run."""
    return result.by_both[-1][0]


def closest(results: dict[str, Result]) -> Result:
    """Of ours with seeds that send and receive FEWER times less, the lowest at the end."""
    most = all_of(results["identity"]) / FEWER
    return lowest(one for one in ours(results) if one.has_seeds and all_of(one) <= most)


def in_figures(sizes: float) -> str:
    """Three figures, without an exponent."""
    return f"{sizes:,.0f}" if sizes >= 100 else f"{sizes:.3g}"


def span(first: float, last: float) -> str:
    """From so many sizes to so many, in two figures: envelopes are compared at points between."""
    first, last = f"{first:.2g}", f"{last:.2g}"
    return f"at {first}" if first == last else f"from {first} to {last}"


def headline(results: dict[str, Result], target: float) -> str:
    """The README's first numbers."""
    identity, near = results["identity"], closest(results)
    fewest = fewest_both_ways(results, target)
    to_target = identity.both(target) / fewest.both(target)
    return (
        f"To the uncompressed run's loss at {100 * TARGET_SHARE:.0f} % of its tokens, "
        f"{in_words(fewest)} takes {to_target:,.0f} times fewer bytes, sent and received; "
        f"{in_words(near)} ends at {near.over(identity):+.2f} % in test loss with "
        f"{all_of(identity) / all_of(near):.0f} times fewer."
    )


def in_words(result: Result) -> str:
    """Its label, but for signs in words that a reader knows."""
    by_layer, by_row = "dense sign, hidden dense sign@tensor", "dense sign"
    told = result.label.replace(by_layer, "a message of signs with a scale a layer")
    return told.replace(by_row, "a message of signs with a scale a row")


def where_others_are_ahead(results: dict[str, Result]) -> str:
    """A sentence on the envelopes."""
    found = ahead(results)
    if not found:
        return "At no number of bytes, sent and received, is another method's loss below ours."
    told = [f"{name} {span(first, last)} sizes" for name, first, last in found]
    return (
        "By bytes sent and received, the lowest loss so far is another method's here: "
        f"{'; '.join(told)}. Everywhere else it is ours."
    )


def differences_told(measured: list[dict]) -> str:
    """What scripts/shakespeare/differences.py says, and its picture; nothing where it has not run.

    Means over hidden layers.
    """
    if not measured:
        return ""

    def at(key: str, every: int) -> float:
        hidden = (r for r in measured if r["every"] == every and r["layer"].startswith("blocks"))
        return mean(r[key] for r in hidden)

    told = (
        "**Why**: most of what a worker's local steps change is noise of its own batches "
        "(`scripts/shakespeare/differences.py`, at the end of the full lr). The cosine of two "
        f"workers' differences falls from {at('cosine', 1):.2f} after a step to "
        f"{at('cosine', 30):.2f} after 30 and {at('cosine', 60):.2f} after 60: the mean of the two "
        "keeps what they share, and a message that is rough in all entries loses little beside it."
        f" The differences have no few directions: a tenth of the rank keeps "
        f"{at('kept', 30):.0%} of the squares after 30 steps, which is why low rank fails there."
    )
    picture = "![What differences of local steps have in common](shakespeare/differences.png)"
    return f"{filled(told)}\n\n{picture}\n"


def rounds_table(results: dict[str, Result], target: float) -> str:
    """Every setting of several steps a round, and DeMo and the best of one step beside them."""
    lines = [
        "| setting | method | seeds | end | over uncompressed | sizes in all | sizes to target "
        "| fewer than uncompressed |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    identity = results["identity"]
    shown = [r for r in results.values() if r.setting.family in (*OF_ROUNDS, "DeMo")]
    for result in [identity, results["served6"], *shown]:
        reached = result.both(target)
        told = ["not reached", ""]
        if reached:
            told = [in_figures(reached), f"{identity.both(target) / reached:,.0f}x"]
        method = "ours" if result in (identity, results["served6"]) else result.setting.family
        cells = [result.label, method.replace("local steps", "ours"), str(len(result.logs))]
        cells += [
            result.final_told,
            f"{result.over(identity):+.2f} %",
            in_figures(all_of(result)),
            *told,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rounds_figure(results: dict[str, Result], target: float) -> Figure:
    """By message and steps a round: bytes both ways to the target, and the loss at the end."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    to_target, at_the_end = figure.subplots(1, 2)
    identity, ticks = results["identity"], set()
    for index, (message, names) in enumerate(LINES.items()):
        shown = [(every(results[name]), results[name]) for name in names if name in results]
        ticks |= {steps for steps, _ in shown}
        look = line_look(index) | {"label": message}
        reached = [(steps, sizes) for steps, one in shown if (sizes := one.both(target))]
        to_target.plot(*zip(*reached, strict=True), **look)
        at_the_end.plot(
            *zip(*((steps, one.over(identity)) for steps, one in shown), strict=True), **look
        )
    to_target.set(ylabel=f"sizes sent and received to loss {target:.3f}", yscale="log")
    to_target.yaxis.set_major_formatter("{x:g}")
    at_the_end.set_ylabel("final test loss over the uncompressed run's (%)")
    for axes in (to_target, at_the_end):
        axes.set_xlabel("steps a round")
        ticks_alone(axes, {steps: str(steps) for steps in sorted(ticks)})
    to_target.legend(fontsize=7)
    return figure


def every(result: Result) -> int:
    """Steps of its rounds."""
    return result.logs[0].run["config"]["optimizer"].get("every", 1)
