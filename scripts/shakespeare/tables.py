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


def reached(value: float | None, say: Callable[[float], str], never: str = "") -> str:
    """What is said of what a run takes to the target, if it gets there."""
    return never if value is None else say(value)


SETTING: Column = ("setting", lambda one: one.label)
SEEDS: Column = ("seeds", lambda one: str(len(one.logs)))
END: Column = ("final test loss", lambda one: one.loss_text)
LOSS: Column = ("final loss", lambda one: f"{one.loss:.4f}")
GAP: Column = ("loss gap", lambda one: f"{one.gap:+.2f} %")
LOSS_AND_GAP: Column = (
    "final loss (gap)",
    lambda one: f"{one.loss:.4f}" + ("" if one.baseline is one else f", {one.gap:+.1f} %"),
)
BITS: Column = ("bits", lambda one: f"{one.bits:.3g}")
MOVED: Column = ("x model size", lambda one: in_figures(one.moved))
TO_TARGET: Column = (
    "x model size to target",
    lambda one: reached(one.sizes_to_target(BOTH), in_figures, "not reached"),
)
FEWER: Column = (
    "fewer than uncompressed",
    lambda one: reached(one.times_to_target(BOTH), "{:,.0f}x".format),
)
# Of what is sent to the servers alone.
OF_SENT: list[Column] = [
    (
        "tokens to target",
        lambda one: reached(one.to_target("tokens"), lambda n: f"{n / 1e6:.2f} M", "not reached"),
    ),
    ("x model size to target", lambda one: reached(one.sizes_to_target(SENT), "{:.2f}".format)),
    ("fewer than uncompressed", lambda one: reached(one.times_to_target(SENT), "{:.1f}x".format)),
]
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


def side_by_side(conditions: dict[str, Results], names: Iterable[str], *columns: Column) -> str:
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
        "workers": side_by_side(conditions, OF_WORKERS, LOSS_AND_GAP, MOVED),
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
    columns = [SETTING, SEEDS, ("bits per parameter and step", BITS[1]), END, GAP, *OF_SENT]
    shown = [one for name, one in results.items() if "/" not in name]
    return table(columns, [one for one in shown if one.setting.family not in (LOCAL, *PEERS)])


def best_within(
    limits: Sequence[float],
    groups: Sequence[Sequence[Result]],
    fits: Callable[[Result, float], bool],
) -> list[list]:
    """For every limit, what in each group has the lowest final loss within it."""
    return [
        [limit, *(study.lowest(one for one in group if fits(one, limit)) for group in groups)]
        for limit in limits
    ]


def ends_table(results: Results) -> str:
    """By how many times fewer bytes, the lowest final losses of ours and of all others."""
    both = study.ours(results), study.of_families(results, *OTHERS)
    rows = best_within(TIMES_FEWER, both, lambda one, times: one.times_fewer >= times)
    other = of(2, ("other methods", lambda one: one.short), none="none")
    columns = [of(0, ("times fewer", "{:,}".format)), of(1, SETTING, "ours", "none"), of(1, GAP)]
    return table([*columns, other, of(2, GAP)], rows)


def budgets_table(workers: dict[int, Results]) -> str:
    """For every number of workers and amount sent, ours with the lowest final loss."""
    compressed = [[one for name, one in p.items() if name != "identity"] for p in workers.values()]
    rows = best_within(BUDGETS, compressed, lambda one, budget: one.moved <= budget)
    best = ("", lambda one: f"{one.label} ({one.loss:.4f})")
    columns = [of(0, ("x model size at most", str))]
    columns += [of(place, best, f"{n} workers", "none") for place, n in enumerate(workers, 1)]
    return table(columns, rows, text_columns=len(columns))


def remedies_table(points: Results) -> str:
    """What was tried for eight workers, beside what it was to help."""

    tried = [
        (*name.removeprefix("local").split("-"), one)
        for name, one in points.items()
        if name.startswith("local")
    ]
    tried.sort(key=lambda row: (int(row[0]), row[1] != "signs"))
    what = ("sync every", lambda row: f"{row[0]}, {CHANGED.get(row[1], row[1])}")
    gap = ("loss gap", lambda one: f"{one.gap:+.1f} %")
    return table([what, of(2, END, "final loss"), of(2, gap), of(2, MOVED)], tried)


def grids_table(results: Results) -> str:
    """The grids by which radii and learning rates were chosen."""
    name = ("grid point, half the steps", lambda one: one.setting.name.removeprefix("grid/"))
    return table([name, ("final test loss", LOSS[1])], study.of_families(results, "grid"))
