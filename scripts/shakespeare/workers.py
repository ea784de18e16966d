"""What more workers cost, 2, 4 and 8 of them, and text that is unlike: a section of the page."""

from statistics import mean

from scripts.measuring import markdown
from scripts.shakespeare.conditions import GENRES, MORE_WORKERS, OF_WORKERS, REMEDIES_EVERY
from scripts.shakespeare.findings import filled, listed
from scripts.shakespeare.results import Result, lowest, of_condition
from scripts.shakespeare.rounds import all_of, in_figures
from training.drawing import Figure
from training.picture import line_look, plain_sizes, ticks_alone

SEQUENCES = 16  # in a step, of all workers
CHANGED = {  # by remedies
    "dense2": "every entry in 2 bits, all of the error kept, no outer momentum",
    "beta1": "inner momentum 0.9 in place of 0.8",
    "beta4": "inner momentum 0.6, with an outer momentum of 0.6",
    "outer6": "outer momentum 0.6, twice as much",
    "outer8": "outer momentum 0.8",
    "radius1": "hidden radius 1, half as much",
    "back": "and back in 2 bits, of the mean of all",
    "back6": "and back in 2 bits, with an outer momentum of 0.6",
}
NOT_IN_LABELS = ("beta1", "beta4", "radius1")
BUDGETS = (1, 3, 10, 30, 100)  # x model size, sent and received in the whole run


def more_workers(found: dict[int, dict[str, Result]], on_gpu: dict[str, Result]) -> str:
    """The page's section; nothing where no run of more than two has been made."""
    if len(found) < 2:
        return ""
    parts = (
        "## With more workers?",
        "![Loss gap by number of workers, and by bytes](shakespeare/workers.png)",
        filled(
            f"The same {SEQUENCES} sequences of a step, shared by more workers; one seed, and "
            "nothing was tuned again but what is named below. A worker receives the messages of "
            "all others, unless those come back as one from the servers; x model size is of what "
            "it sends and receives in the whole run."
        ),
        workers_table(found),
        filled(
            "Of all our runs with each number of workers, by what a worker may send and receive, "
            "the one with the lowest final loss:"
        ),
        map_table(found),
        filled(workers_text(found)),
        remedies(found),
        filled(back_text(found)),
        filled(gpu_text(found, on_gpu)),
    )
    return "\n\n".join(filter(None, parts)) + "\n\n"


def workers_table(found: dict[int, dict[str, Result]]) -> str:
    """Of every point and number of workers the final loss, the loss gap, and what is sent."""
    counts = sorted(found)
    rows = [
        [
            "setting",
            *(
                f"{n} workers: {what}"
                for n in counts
                for what in ("final loss (gap)", "x model size")
            ),
        ]
    ]
    for name in OF_WORKERS:
        cells = []
        for n in counts:
            result, identity = found[n].get(name), found[n].get("identity")
            if result is None or identity is None:
                cells += ["not run", ""]
                continue
            over = "" if name == "identity" else f", {result.over(identity):+.1f} %"
            cells += [f"{mean(result.final):.4f}{over}", in_figures(all_of(result))]
        rows.append([found[2][name].label, *cells])
    return markdown(rows, text_columns=1)


def map_table(found: dict[int, dict[str, Result]]) -> str:
    """For every number of workers and amount sent the point with the lowest final loss."""
    rows = [["x model size at most", *(f"{n} workers" for n in sorted(found))]]
    for budget in BUDGETS:
        cells = []
        for n in sorted(found):
            best = lowest(
                one
                for name, one in found[n].items()
                if name != "identity" and all_of(one) <= budget
            )
            cells.append(point_text(best) if best else "none")
        rows.append([str(budget), *cells])
    return markdown(rows, text_columns=len(rows[0]))


def point_text(one: Result) -> str:
    """A point by its label, and by what it changes that labels do not name; and its loss."""
    what = one.setting.name.rpartition("-")[2]
    changed = f", {CHANGED[what]}" if what in NOT_IN_LABELS else ""
    return f"{one.label}{changed} ({mean(one.final):.4f})"


def workers_text(found: dict[int, dict[str, Result]]) -> str:
    """What a round every 30 steps costs more workers, and with one how often it costs little."""
    costs = []
    for n, of_many in sorted(found.items()):
        if {"identity", "local30-signs", "local10-signs"} <= of_many.keys():
            every_30, every_10 = (
                f"{of_many[name].over(of_many['identity']):+.1f} %"
                for name in ("local30-signs", "local10-signs")
            )
            costs.append(
                f"{n} workers, of {SEQUENCES // n} sequences each, {every_30} ({every_10})"
            )
    return (
        "The loss gaps to their own uncompressed runs with a sync every 30 steps (every 10) are "
        f"{listed(costs)}."
    )


def remedies(found: dict[int, dict[str, Result]]) -> str:
    """What was tried for the most workers, beside what it was to help; nothing where none ran."""
    most = found.get(max(MORE_WORKERS), {})
    rows = [["sync every", "final loss", "loss gap", "x model size"]]
    for every, names in REMEDIES_EVERY.items():
        for what in ("signs", *names):
            if "identity" in most and (one := most.get(f"local{every}-{what}")) is not None:
                row = [one.final_text, f"{one.over(most['identity']):+.1f} %"]
                row.append(in_figures(all_of(one)))
                rows.append([f"{every}, {CHANGED.get(what, 'as above')}", *row])
    if len(rows) <= 1 + len(REMEDIES_EVERY):
        return ""
    what = f"What was tried for {max(MORE_WORKERS)} workers, whose batches are the smallest:"
    return f"{what}\n\n{markdown(rows, text_columns=1)}"


def back_text(found: dict[int, dict[str, Result]]) -> str:
    """What it saves that servers send back one message; nothing where that has not run."""
    most = found.get(max(MORE_WORKERS), {})
    compared = []
    for every in REMEDIES_EVERY:
        back, plain = most.get(f"local{every}-back"), most.get(f"local{every}-signs")
        if back and plain and "identity" in most:
            with_it, without = (
                f"{one.over(most['identity']):+.1f} % at {in_figures(all_of(one))} x model size"
                for one in (back, plain)
            )
            compared.append(f"{with_it} with it and {without} without it, every {every} steps")
    if not compared:
        return ""
    return (
        f"Most of what one of {max(MORE_WORKERS)} workers receives are the messages of the others. "
        "Where servers send back one of 2 bits, of the mean of all, syncs may be more frequent for "
        f"the same bytes. Loss gaps are {'; '.join(compared)}."
    )


def gpu_text(found: dict[int, dict[str, Result]], on_gpu: dict[str, Result]) -> str:
    """What the same runs came to on a GPU."""
    losses = []
    for name, one in on_gpu.items():
        workers, _, point = name.removeprefix("workers/").removesuffix("-gpu").partition("-")
        if (here := found.get(int(workers), {}).get(point)) is not None:
            losses.append(f"{mean(one.final):.4f} ({here.label}, here {mean(here.final):.4f})")
    if not losses:
        return ""
    return f"On a GPU that all workers share, in bfloat16, the final losses are {listed(losses)}."


def workers_figure(found: dict[int, dict[str, Result]]) -> Figure:
    """The loss gap to as many workers uncompressed: by their number, by bytes."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    by_number, by_bytes = figure.subplots(1, 2, sharey=True)
    for index, name in enumerate(name for name in OF_WORKERS if name != "identity"):
        points = [
            (n, of_many[name].over(of_many["identity"]))
            for n, of_many in sorted(found.items())
            if {name, "identity"} <= of_many.keys()
        ]
        by_number.plot(*zip(*points, strict=True), label=found[2][name].short, **line_look(index))
    for index, (n, of_many) in enumerate(sorted(found.items())):
        points = sorted(
            (all_of(of_many[name]), of_many[name].over(of_many["identity"]))
            for name in OF_WORKERS
            if name.endswith("signs") and {name, "identity"} <= of_many.keys()
        )
        by_bytes.plot(*zip(*points, strict=True), label=f"{n} workers", **line_look(index))
    by_number.set_xlabel("workers")
    by_number.set_ylabel("loss gap (%)")
    ticks_alone(by_number, {n: str(n) for n in sorted(found)})
    by_bytes.set(
        xlabel="x model size (fp32), sent and received, signs of all entries", xscale="log"
    )
    plain_sizes(by_bytes)
    for axes in (by_number, by_bytes):
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.legend(fontsize=7)
    return figure


def unlike_text(found: dict[str, Result]) -> str:
    """Its part of the section; nothing where none of its runs has been made."""
    both = {order: of_condition(found, f"genres/{order}") for order in GENRES}
    if not all("identity" in points for points in both.values()):
        return ""
    rows = [
        [
            "setting",
            *(f"{order}: {what}" for order in GENRES for what in ("final loss", "loss gap")),
        ]
    ]
    for name in both[GENRES[0]]:
        if not all(name in points for points in both.values()):
            continue
        row = [both[GENRES[0]][name].label]
        for points in both.values():
            over = points[name].over(points["identity"])
            row += [f"{mean(points[name].final):.4f}", f"{over:+.2f} %"]
        rows.append(row)
    setting = (
        "Histories to one worker and as much of comedies to the other (apart), or passages of "
        "1,024 bytes of both to both (mixed): the same text, 600 steps, one seed; over the "
        "uncompressed run of the same. The test text is of all plays. In the study itself one "
        "worker has comedies and histories, the other tragedies, romances and the rest."
    )
    parts = ("### Unlike text", filled(setting), markdown(rows, text_columns=1))
    return "\n\n".join(parts) + "\n\n"
