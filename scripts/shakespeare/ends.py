"""What compression costs at the end: the loss gap by the bytes that a worker sends and receives."""

from scripts.measuring import markdown
from scripts.shakespeare.envelopes import METHODS, Method, of_method
from scripts.shakespeare.findings import filled
from scripts.shakespeare.results import Result, lowest
from scripts.shakespeare.rounds import all_of
from training.drawing import Figure, NullLocator
from training.picture import plain_sizes

FEWER = (10, 30, 100, 300, 1000, 2000, 5000)  # times, than without compression
GAPS = (-1, 100)  # percent over uncompressed that are drawn
OURS, OTHERS = METHODS[-1], [one for one in METHODS[:-1] if one.families != ("identity",)]


def fewer(one: Result, identity: Result) -> float:
    """How many times fewer bytes it sends and receives in the whole run."""
    return all_of(identity) / all_of(one)


def nothing_lost(results: dict[str, Result]) -> str:
    """The page's section."""
    identity = results["identity"]
    several = [
        f"{one.label} {one.final_text} ({fewer(one, identity):,.0f} times fewer)"
        for one in of_method(results, OURS)
        if len(one.logs) > 1 and one.over(identity) <= 1
    ]
    text = (
        f"Without compression the final loss is {identity.final_text}, of {len(identity.logs)} "
        f"seeds. With as many seeds, a loss gap of at most 1 % have "
        f"{'; '.join(several) or 'none'}. The table has the lowest final loss among all that "
        "send and receive so many times fewer bytes in the whole run, or fewer still; most are of "
        "one seed."
    )
    picture = "![Loss gap by bytes sent and received](shakespeare/ends.png)"
    parts = ("## Is nothing lost at the end?", filled(text), picture, ends_table(results))
    return "\n\n".join(parts) + "\n\n"


def ends_table(results: dict[str, Result]) -> str:
    """By how many times fewer bytes, the lowest final losses of ours and of all others."""
    identity, of_ours, of_others = results["identity"], of_method(results, OURS), others(results)
    rows = [["times fewer", "ours", "loss gap", "other methods", "loss gap"]]
    for times in FEWER:
        cells = [f"{times:,}"]
        for members in (of_ours, of_others):
            best = lowest(one for one in members if fewer(one, identity) >= times)
            if best is None:
                cells += ["none", ""]
                continue
            name = best.label if members is of_ours else best.short
            cells += [name, f"{best.over(identity):+.2f} %"]
        rows.append(cells)
    return markdown(rows, text_columns=1)


def others(results: dict[str, Result]) -> list[Result]:
    """All runs of other methods, but for grids."""
    return [one for method in OTHERS for one in of_method(results, method)]


def ends_figure(results: dict[str, Result]) -> Figure:
    """Of every setting its loss gap, by how many times fewer bytes."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for method in (*OTHERS, OURS):
        if members := of_method(results, method):
            draw(axes, method, members, results["identity"])
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_xlabel("times fewer bytes that a worker sends and receives in the whole run")
    over_sizes(axes)
    axes.set_ylim(*GAPS)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return figure


def over_sizes(axes) -> None:
    """Loss gaps upwards, which may be below 0, by bytes."""
    axes.set(ylabel="loss gap (%)", xscale="log")
    axes.set_yscale("symlog", linthresh=1)
    plain_sizes(axes)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def draw(axes, method: Method, members: list[Result], identity: Result) -> None:
    """The points of a method."""
    axes.plot(
        [fewer(one, identity) for one in members],
        [one.over(identity) for one in members],
        marker="o" if method is OURS else "s",
        linestyle="",
        color=method.colour,
        fillstyle="full" if method.style == "-" else "none",
        label=method.name.replace("\n", " "),
    )
