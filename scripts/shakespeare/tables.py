"""The tables of results/README.md: what a row is of, and a function for every column."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from scripts.shakespeare import results as study
from scripts.shakespeare.results import BOTH, LOCAL, OTHERS, PEERS, SENT, Result, Results
from scripts.shakespeare.runs import OF_LONGER, OF_SIZES, OF_WORKERS, SIZES
from scripts.studies import markdown

Column = tuple[str, Callable[[Any], str]]  # its heading, and the cell of a row

TIMES_FEWER = (10, 30, 100, 300, 1000, 2000, 5000)  # times, than without compression
BUDGETS = (1, 3, 10, 30, 100)  # x model size, sent and received in the whole run
CHANGED = {  # for eight workers
    "signs": "as above",
    "dense2": "every entry in 2 bits, all of the error kept, no outer momentum",
    "beta1": "inner momentum 0.9 in place of 0.8",
    "beta4": "inner momentum 0.6, with an outer momentum of 0.6",
    "outer6": "outer momentum 0.6, twice as much",
    "outer8": "outer momentum 0.8",
    "radius1": "hidden radius 1, half as much",
    "back": "and back in 2 bits, of the mean of all",
    "back6": "and back in 2 bits, with an outer momentum of 0.6",
}


def in_figures(sizes: float) -> str:
    """Three figures, without an exponent."""
    return f"{sizes:,.0f}" if sizes >= 100 else f"{sizes:.3g}"


def sizes_to_target(one: Result) -> str:
    reached = one.sizes_to_target(BOTH)
    return in_figures(reached) if reached else "not reached"


def times_to_target(one: Result) -> str:
    times = one.times_to_target(BOTH)
    return f"{times:,.0f}x" if times else ""


def loss_and_gap(one: Result) -> str:
    return f"{one.loss:.4f}" + ("" if one.is_baseline else f", {one.gap:+.1f} %")


def tokens_to_target(one: Result) -> str:
    reached = one.to_target("tokens")
    return f"{reached / 1e6:.2f} M" if reached else "not reached"


def sent_to_target(one: Result) -> str:
    reached = one.sizes_to_target(SENT)
    return f"{reached:.2f}" if reached else ""


def fewer_sent(one: Result) -> str:
    times = one.times_to_target(SENT)
    return f"{times:.1f}x" if times else ""


SETTING: Column = ("setting", lambda one: one.label)
SEEDS: Column = ("seeds", lambda one: str(len(one.logs)))
END: Column = ("final test loss", lambda one: one.loss_text)
LOSS: Column = ("final loss", lambda one: f"{one.loss:.4f}")
GAP: Column = ("loss gap", lambda one: f"{one.gap:+.2f} %")
BITS: Column = ("bits", lambda one: f"{one.bits:.3g}")
MOVED: Column = ("x model size", lambda one: in_figures(one.moved))
TO_TARGET: Column = ("x model size to target", sizes_to_target)
FEWER: Column = ("fewer than uncompressed", times_to_target)
END_AND_GAP: Column = ("final loss (gap)", loss_and_gap)
OF_A_SIZE: list[Column] = [
    ("parameters", lambda one: f"{one.run['parameters']:,}"),
    SETTING,
    ("on", lambda one: "GPU" if one.run["device"] == "cuda" else "CPU"),
    *(LOSS, GAP, MOVED, TO_TARGET, FEWER),
]


def table(columns: Sequence[Column], rows: Iterable, text_columns: int | tuple = 1) -> str:
    cells = [[cell(row) for _, cell in columns] for row in rows]
    return markdown([[heading for heading, _ in columns], *cells], text_columns)


def of(place: int, column: Column, heading: str = "", none: str = "") -> Column:
    """The column of one of several results in a row, which may be none."""
    own, cell = column
    return heading or own, lambda row: none if row[place] is None else cell(row[place])


def side_by_side(
    conditions: dict[str, dict[str, Result]], names: Iterable[str], *columns: Column
) -> str:
    """The same settings under several conditions."""
    rows = [[points[name] for points in conditions.values()] for name in names]
    of_each = [
        of(place, column, f"{condition}: {column[0]}")
        for place, condition in enumerate(conditions)
        for column in columns
    ]
    return table([of(0, SETTING), *of_each], rows)


def tables(results: Results) -> dict[str, str]:
    """All of the page, by their names in page.md."""
    workers = study.by_workers(results)
    conditions = {f"{n} workers": points for n, points in workers.items()}
    genres = {order: study.of_condition(results, f"genres/{order}") for order in ("apart", "mixed")}
    of_sizes = [study.of_condition(results, f"sizes/{size}-1") for size in SIZES]
    one_token = [points[name] for points in of_sizes for name in OF_SIZES if name in points]
    longer = [*(results[n] for n in OF_LONGER), *study.of_condition(results, "sizes/3M-3").values()]
    return {
        "peers": pairs_table(study.at_their_bytes(results), MOVED),
        "rivals": pairs_table(study.at_their_rate(results), BITS),
        "rounds": rounds_table(results),
        "settings": settings_table(results),
        "ends": ends_table(results),
        "workers": side_by_side(conditions, OF_WORKERS, END_AND_GAP, MOVED),
        "budgets": budgets_table(workers),
        "remedies": remedies_table(workers[8]),
        "genres": side_by_side(genres, genres["apart"], LOSS, GAP),
        "larger_models": table(OF_A_SIZE, one_token, text_columns=3),
        "longer": table(OF_A_SIZE, longer, text_columns=3),
        "grids": grids_table(results),
    }


def pairs_table(pairs: list[tuple[Result, Result]], amount: Column) -> str:
    """Other methods, and ours beside them."""
    name = ("other method", lambda one: one.short if one.setting.family in PEERS else one.label)
    other = of(0, name), of(0, amount), of(0, GAP)
    ours = of(1, SETTING, "ours"), of(1, amount), of(1, GAP)
    return table([*other, *ours], pairs, text_columns=(0, 3))


def rounds_table(results: Results) -> str:
    """All of several steps per round; beside them DeMo, and ours that syncs every step."""
    method = ("method", lambda one: family if (family := one.setting.family) in OTHERS else "ours")
    columns = [SETTING, method, SEEDS, END, GAP, MOVED, TO_TARGET, FEWER]
    shown = study.of_families(results, LOCAL, *PEERS, "DeMo")
    return table(columns, [results["identity"], results["served6"], *shown], text_columns=2)


def settings_table(results: Results) -> str:
    """All that sync every step: the rate, the final loss, and what it takes to the target."""
    columns = [
        *(SETTING, SEEDS),
        ("bits per parameter and step", BITS[1]),
        *(END, GAP),
        ("tokens to target", tokens_to_target),
        ("x model size to target", sent_to_target),
        ("fewer than uncompressed", fewer_sent),
    ]
    shown = [one for name, one in results.items() if "/" not in name]
    return table(columns, [one for one in shown if one.setting.family not in (LOCAL, *PEERS)])


def ends_table(results: Results) -> str:
    """By how many times fewer bytes, the lowest final losses of ours and of all others."""
    both = study.ours(results), study.of_families(results, *OTHERS)
    rows = [
        [
            times,
            *(study.lowest(one for one in members if one.times_fewer >= times) for members in both),
        ]
        for times in TIMES_FEWER
    ]
    other = of(2, ("other methods", lambda one: one.short), none="none")
    columns = [of(0, ("times fewer", "{:,}".format)), of(1, SETTING, "ours", "none"), of(1, GAP)]
    return table([*columns, other, of(2, GAP)], rows)


def budgets_table(workers: dict[int, dict[str, Result]]) -> str:
    """For every number of workers and amount sent, ours with the lowest final loss."""
    compressed = [[one for name, one in p.items() if name != "identity"] for p in workers.values()]
    rows = [
        [
            budget,
            *(
                study.lowest(one for one in members if one.moved <= budget)
                for members in compressed
            ),
        ]
        for budget in BUDGETS
    ]
    best = ("", lambda one: f"{one.label} ({one.loss:.4f})")
    columns = [of(0, ("x model size at most", str))]
    columns += [of(place, best, f"{n} workers", "none") for place, n in enumerate(workers, 1)]
    return table(columns, rows, text_columns=len(columns))


def remedies_table(points: dict[str, Result]) -> str:
    """What was tried for eight workers, beside what it was to help."""

    def in_order(name: str) -> tuple[int, bool]:
        every, _, what = name.removeprefix("local").partition("-")
        return int(every), what != "signs"

    names = sorted((name for name in points if name.startswith("local")), key=in_order)
    what = ("sync every", lambda row: f"{in_order(row[0])[0]}, {CHANGED[row[0].partition('-')[2]]}")
    gap = ("loss gap", lambda one: f"{one.gap:+.1f} %")
    columns = [what, of(1, END, "final loss"), of(1, gap), of(1, MOVED)]
    return table(columns, [(name, points[name]) for name in names])


def grids_table(results: Results) -> str:
    """The grids by which radii and learning rates were chosen."""
    name = ("grid point, half the steps", lambda one: one.setting.name.removeprefix("grid/"))
    return table([name, ("final test loss", LOSS[1])], study.of_families(results, "grid"))
