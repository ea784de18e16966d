"""Whether it holds as the model grows: a section of the page."""

from collections.abc import Iterable
from statistics import mean

from scripts.measuring import markdown
from scripts.shakespeare.conditions import LONGER, MIDDLE, OF_LONGER, ON_CPU, POINTS, SIZES
from scripts.shakespeare.findings import filled, listed
from scripts.shakespeare.results import Result, of_condition, target_loss
from scripts.shakespeare.rounds import all_of, in_figures
from training.drawing import Figure
from training.picture import line_look, ticks_alone

OTHER = "muloco"
SHORT = {  # in sentences
    "served6": "sync every step",
    "local4-signs": "signs, sync every 4 steps",
    "local30-signs": "signs, sync every 30",
    "local60-signs": "signs, sync every 60",
    OTHER: "MuLoCo, sync every 30",
}
MACHINES = {"cuda": "an H100 that they share", "cpu": "two CPU cores"}


def larger_models(found: dict[str, Result], studied: dict[str, Result]) -> str:
    """The page's section; nothing where no run of another size has been made."""
    if not found:
        return ""
    runs = [log.run for one in found.values() for log in one.logs]
    versions = {run["device"]: run["versions"]["torch"] for run in runs}
    machines = " or ".join(
        f"{machine} (torch {versions[device]})"
        for device, machine in MACHINES.items()
        if device in versions
    )
    steps = listed(f"{steps:,} ({size})" for size, (*_, steps) in SIZES.items())
    setting = (
        f"One token per parameter, so that there are {steps} steps of 4,096 tokens, by two workers "
        f"in bfloat16 on {machines}, one seed; radii and momentum are those of 0.8 M parameters. "
        "Each size has a target of its own, the uncompressed run's loss at 75 % of its tokens."
    )
    parts = (
        "## Does it hold as the model grows?",
        "![Bytes to the target, and loss gap, by parameters](shakespeare/sizes.png)",
        filled(setting),
        sizes_table(of_condition(found, f"sizes/{size}-1") for size in SIZES),
        filled(sizes_text(found)),
        *longer(found, studied),
    )
    return "\n\n".join(parts) + "\n\n"


def longer(found: dict[str, Result], studied: dict[str, Result]) -> list[str]:
    """What more tokens per parameter change, once they have run."""
    points = of_condition(found, f"sizes/{MIDDLE}-{LONGER}")
    if "identity" not in points:
        return []
    text = (
        f"With {LONGER} tokens per parameter, which in the smallest model are the runs of the "
        "study itself, in float32:"
    )
    of_study = {name: studied[name] for name in OF_LONGER if name in studied}
    return [text, sizes_table([of_study, points])]


def sizes_table(several: Iterable[dict[str, Result]]) -> str:
    """Of every size and point the final loss, and what it sends and receives."""
    heading = ["parameters", "setting", "on", "final loss", "loss gap", "x model size"]
    rows = [[*heading, "x model size to target", "fewer than uncompressed"]]
    for points in several:
        for name, one in points.items():
            if name in POINTS:
                run = one.logs[0].run
                device = "GPU" if run["device"] == "cuda" else "CPU"
                own = [f"{run['parameters']:,}", one.label, device]
                rows.append([*own, *cells(one, points)])
    return markdown(rows, text_columns=3)


def cells(one: Result, points: dict[str, Result]) -> list[str]:
    """Final loss, loss gap, x model size in all and to the target, and how many times fewer."""
    end = [f"{mean(one.final):.4f}"]
    identity = points.get("identity")
    if identity is None:
        return [*end, "not run", in_figures(all_of(one)), "", ""]
    target = target_loss(identity)
    reached, whole = one.both(target), identity.both(target)
    end += [f"{one.over(identity):+.2f} %", in_figures(all_of(one))]
    return end + ([in_figures(reached), f"{whole / reached:,.0f}x"] if reached else ["never", ""])


def sizes_text(found: dict[str, Result]) -> str:
    """How the losses of rounds and of MuLoCo change with the size."""
    gaps: dict[str, list[str]] = {}
    for size in SIZES:
        points = of_condition(found, f"sizes/{size}-1")
        for name in SHORT.keys() & points.keys() if "identity" in points else ():
            gaps.setdefault(name, []).append(f"{points[name].over(points['identity']):+.1f} %")
    several = [
        f"{words} {listed(gaps[name])}"
        for name, words in SHORT.items()
        if len(gaps.get(name, ())) > 1
    ]
    return (
        f"Loss gaps to the uncompressed run of the same size, from the smallest model on: "
        f"{'; '.join(several)}."
        " A larger model has more steps here, so more rounds: which of the two helps, these runs "
        f"do not show.{middle_text(of_condition(found, f'sizes/{MIDDLE}-1'))}"
    )


def middle_text(points: dict[str, Result]) -> str:
    """Whether radii transfer to this size, and whether its runs of both devices agree."""
    text = ""
    radii = {int(name[-1]): one for name, one in points.items() if name.startswith("radius")}
    if radii and ON_CPU in points:
        radii = dict(sorted((radii | {2: points[ON_CPU]}).items()))
        ends = [f"{mean(one.final):.4f}" for one in radii.values()]
        text = (
            f" With a hidden radius of {listed(map(str, radii))} the final losses of {MIDDLE} "
            f"uncompressed are {listed(ends)} on CPUs."
        )
    if ON_CPU in points:
        ends = [f"{mean(points[name].final):.4f}" for name in ("identity", ON_CPU)]
        text += (
            f" On a GPU the final loss of {MIDDLE} uncompressed is {ends[0]}, on CPUs {ends[1]}: a "
            "run on each, as in 10M, may differ by as much for that alone."
        )
    return text


def sizes_figure(found: dict[str, Result]) -> Figure:
    """By parameters: how many times fewer bytes to each size's target, and loss gap."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    fewer, over = figure.subplots(1, 2)
    ticks = {}
    for index, (name, words) in enumerate(SHORT.items()):
        to_target, at_the_end = [], []
        for size in SIZES:
            points = of_condition(found, f"sizes/{size}-1")
            if not {name, "identity"} <= points.keys():
                continue
            one, identity = points[name], points["identity"]
            parameters = one.logs[0].run["parameters"]
            ticks[parameters] = f"{parameters / 1e6:.1f} M"
            target = target_loss(identity)
            if reached := one.both(target):
                to_target.append((parameters, identity.both(target) / reached))
            at_the_end.append((parameters, one.over(identity)))
        for axes, points in ((fewer, to_target), (over, at_the_end)):
            if points:
                axes.plot(*zip(*points, strict=True), label=words, **line_look(index))
    fewer.set(ylabel="times fewer bytes to the size's own target", yscale="log")
    fewer.yaxis.set_major_formatter("{x:g}")
    over.set_ylabel("loss gap (%)")
    over.axhline(0, color="#888888", linewidth=0.8)
    for axes in (fewer, over):
        axes.set_xlabel("parameters")
        ticks_alone(axes, ticks)
    over.legend(fontsize=7)
    return figure
