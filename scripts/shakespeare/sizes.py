"""Whether it holds as the model grows, and for text that is unlike: sections of the page."""

from statistics import mean

from scripts.measuring import markdown
from scripts.shakespeare.conditions import GENRES, RADII_OF, SIZES
from scripts.shakespeare.findings import filled, listed
from scripts.shakespeare.results import Result, target_loss
from scripts.shakespeare.rounds import all_of, in_figures

OTHER = "muloco"
SHORT = {  # in sentences
    "served6": "a message a step",
    "local4-top30": "signs every 4 steps",
    "local30-top30": "every 30",
    "local60-top30": "every 60",
    OTHER: "MuLoCo every 30",
}


def of_condition(found: dict[str, Result], condition: str) -> dict[str, Result]:
    """Those whose names begin so, by the rest of their names."""
    begins = f"{condition}-"
    return {
        name.removeprefix(begins): result
        for name, result in found.items()
        if name.startswith(begins)
    }


def larger_models(found: dict[str, Result]) -> str:
    """The page's section; nothing where no run of another size has been made."""
    if not found:
        return ""
    torch = next(iter(found.values())).logs[0].run["versions"]["torch"]
    told = listed(f"{steps:,} ({size})" for size, (*_, steps) in SIZES.items())
    setting = (
        f"One token a parameter, so that there are {told} steps of 4,096 tokens, by two workers "
        f"that share an H100 (torch {torch}, bfloat16), one seed; radii and beta are those of "
        "0.8 M parameters. Each size has a target of its own, the uncompressed run's loss at 75 % "
        "of its tokens."
    )
    parts = ("## Larger models", filled(setting), sizes_table(found), filled(sizes_told(found)))
    return "\n\n".join(parts) + "\n\n"


def sizes_table(found: dict[str, Result]) -> str:
    """Of every size and point the loss at the end, and what it sends and receives."""
    heading = ["parameters", "setting", "end", "over uncompressed", "sizes in all"]
    rows = [[*heading, "sizes to target", "fewer than uncompressed"]]
    for size in SIZES:
        points = of_condition(found, f"sizes/{size}-1")
        rows += [
            [f"{one.logs[0].run['parameters']:,}", one.label, *cells(one, points)]
            for name, one in points.items()
            if not name.startswith("radius")
        ]
    return markdown(rows, text_columns=2)


def cells(one: Result, points: dict[str, Result]) -> list[str]:
    """End, over uncompressed, sizes in all and to the target, and how many times fewer."""
    told = [f"{mean(one.final):.4f}"]
    identity = points.get("identity")
    if identity is None:
        return [*told, "not run", in_figures(all_of(one)), "", ""]
    target = target_loss(identity)
    reached, whole = one.both(target), identity.both(target)
    told += [f"{one.over(identity):+.2f} %", in_figures(all_of(one))]
    return told + ([in_figures(reached), f"{whole / reached:,.0f}x"] if reached else ["never", ""])


def sizes_told(found: dict[str, Result]) -> str:
    """How the losses of rounds and of MuLoCo change with the size."""
    gaps: dict[str, list[str]] = {}
    for size in SIZES:
        points = of_condition(found, f"sizes/{size}-1")
        for name in SHORT.keys() & points.keys() if "identity" in points else ():
            gaps.setdefault(name, []).append(f"{points[name].over(points['identity']):+.1f} %")
    several = [
        f"{told} {' and '.join(gaps[name])}"
        for name, told in SHORT.items()
        if len(gaps.get(name, ())) > 1
    ]
    largest = of_condition(found, f"sizes/{list(SIZES)[-1]}-1")
    ends = [
        f"{told} {mean(largest[name].final):.4f}" for name, told in SHORT.items() if name in largest
    ]
    of_radii = of_condition(found, f"sizes/{RADII_OF}-1")
    radii = [
        f"{name.removeprefix('radius')} {mean(one.final):.4f}"
        for name, one in of_radii.items()
        if name.startswith("radius")
    ]
    transfer = ""
    if radii:
        transfer = f" Of {RADII_OF}, uncompressed, with a hidden radius of {listed(radii)}."
    return (
        f"Over the uncompressed run of its size, from the smallest model on: {'; '.join(several)}."
        " A larger model has more steps here, so more rounds: which of the two helps, these runs "
        f"do not tell. In the largest: {'; '.join(ends)}.{transfer}"
    )


def unlike_text(found: dict[str, Result]) -> str:
    """The page's section; nothing where none of its runs has been made."""
    both = {order: of_condition(found, f"genres/{order}") for order in GENRES}
    if not all("identity" in points for points in both.values()):
        return ""
    rows = [["setting", *(f"{order}: {what}" for order in GENRES for what in ("end", "over"))]]
    for name in both[GENRES[0]]:
        if not all(name in points for points in both.values()):
            continue
        told = [both[GENRES[0]][name].label]
        for points in both.values():
            over = points[name].over(points["identity"])
            told += [f"{mean(points[name].final):.4f}", f"{over:+.2f} %"]
        rows.append(told)
    setting = (
        "Histories to one worker and as much of comedies to the other (apart), or passages of "
        "1,024 bytes of both to both (mixed): the same text, 600 steps, one seed; over the "
        "uncompressed run of the same. The test text is of all plays. In the study itself one "
        "worker has comedies and histories, the other tragedies, romances and the rest."
    )
    parts = ("## Unlike text", filled(setting), markdown(rows, text_columns=1))
    return "\n\n".join(parts) + "\n\n"
