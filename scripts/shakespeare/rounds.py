"""Both axes of the study: bits per message, and messages per step; bytes sent and received."""

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
    "quantized rank 6 %, momentum at the server": ["served6"],
    "Muon, PowerSGD rank 16": ["powersgd16"],
    "everything": ["identity"],
}


def all_of(result: Result) -> float:
    """What is sent and received in the whole run, x model size."""
    return result.by_both[-1][0]


def closest(results: dict[str, Result]) -> Result:
    """Of ours with seeds that move FEWER times fewer bytes, the one with the lowest final loss."""
    most = all_of(results["identity"]) / FEWER
    return lowest(one for one in ours(results) if one.has_seeds and all_of(one) <= most)


def in_figures(sizes: float) -> str:
    """Three figures, without an exponent."""
    return f"{sizes:,.0f}" if sizes >= 100 else f"{sizes:.3g}"


def span(first: float, last: float) -> str:
    """From one size to another, in two figures: envelopes are compared at points between."""
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
        f"{in_words(near)} has a final test loss {near.over(identity):+.2f} % from the "
        f"uncompressed run's with {all_of(identity) / all_of(near):.0f} times fewer."
    )


def in_words(result: Result) -> str:
    """Its label, but for signs in words that a reader knows."""
    by_layer, by_row = "sign, hidden sign@tensor", "sign"
    for signs, words in (
        (by_layer, "a message of signs with a scale per layer"),
        (by_row, "a message of signs with a scale per row"),
    ):
        if result.label == signs or result.label.startswith(f"{signs}, "):
            return words + result.label.removeprefix(signs)
    return result.label


def where_others_are_ahead(results: dict[str, Result]) -> str:
    """A sentence on the envelopes."""
    found = ahead(results)
    if not found:
        return "At no number of bytes, sent and received, is another method's loss below ours."
    others = [f"{name} {span(first, last)} x model size" for name, first, last in found]
    return (
        "By bytes sent and received, the lowest loss so far is another method's here: "
        f"{'; '.join(others)}. Everywhere else it is ours."
    )


def differences_text(measured: list[dict]) -> str:
    """What scripts/shakespeare/differences.py says, and its picture; nothing where it has not run.

    Means over hidden layers.
    """
    if not measured:
        return ""

    def at(key: str, every: int) -> float:
        hidden = (r for r in measured if r["every"] == every and r["layer"].startswith("blocks"))
        return mean(r[key] for r in hidden)

    text = (
        "**Why**: most of what a worker's local steps change is noise of its own batches "
        "(`scripts/shakespeare/differences.py`, at the end of the full lr). The cosine of two "
        f"workers' differences falls from {at('cosine', 1):.2f} after a step to "
        f"{at('cosine', 30):.2f} after 30 and {at('cosine', 60):.2f} after 60: the mean of the two "
        "keeps what they share, and a message that is rough in all entries loses little beside it."
        f" The differences have no few directions: a tenth of the rank keeps "
        f"{at('kept', 30):.0%} of the squares after 30 steps, which is why low rank fails there."
    )
    picture = "![What differences of local steps have in common](shakespeare/differences.png)"
    return f"{filled(text)}\n\n{picture}\n"


def rounds_table(results: dict[str, Result], target: float) -> str:
    """Every setting of several steps per round; beside them DeMo and ours that syncs every step."""
    lines = [
        "| setting | method | seeds | final test loss | loss gap | x model size "
        "| x model size to target | fewer than uncompressed |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    identity = results["identity"]
    shown = [r for r in results.values() if r.setting.family in (*OF_ROUNDS, "DeMo")]
    for result in [identity, results["served6"], *shown]:
        reached = result.both(target)
        to_target = ["not reached", ""]
        if reached:
            to_target = [in_figures(reached), f"{identity.both(target) / reached:,.0f}x"]
        method = "ours" if result in (identity, results["served6"]) else result.setting.family
        cells = [result.label, method.replace("local steps", "ours"), str(len(result.logs))]
        cells += [
            result.final_text,
            f"{result.over(identity):+.2f} %",
            in_figures(all_of(result)),
            *to_target,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rounds_figure(results: dict[str, Result], target: float) -> Figure:
    """By message and steps per round: bytes both ways to the target, and the loss gap."""
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
    to_target.set(ylabel=f"x model size (fp32), both ways, to loss {target:.3f}", yscale="log")
    to_target.yaxis.set_major_formatter("{x:g}")
    at_the_end.set_ylabel("loss gap (%)")
    for axes in (to_target, at_the_end):
        axes.set_xlabel("steps per round")
        ticks_alone(axes, {steps: str(steps) for steps in sorted(ticks)})
    to_target.legend(fontsize=7)
    return figure


def every(result: Result) -> int:
    """Steps of its rounds."""
    return result.logs[0].run["config"]["optimizer"].get("sync_every", 1)
