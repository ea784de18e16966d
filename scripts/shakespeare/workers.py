"""What more workers cost: the same points of both axes, with 2, 4 and 8 of them."""

from statistics import mean

from scripts.measuring import markdown
from scripts.shakespeare.findings import filled, listed
from scripts.shakespeare.results import Result
from scripts.shakespeare.rounds import all_of, in_figures
from scripts.shakespeare.settings import OF_WORKERS

SEQUENCES = 16  # in a step, of all workers
BUDGETS = (1, 3, 10, 30, 100)  # sizes sent and received in the whole run


def more_workers(found: dict[int, dict[str, Result]]) -> str:
    """The page's section; nothing where no run of more than two has been made."""
    if len(found) < 2:
        return ""
    return f"""## More workers

The same {SEQUENCES} sequences of a step, shared by more workers; nothing was tuned again, one seed.
A worker receives the messages of all others, unless those come back as one from the servers; sizes
are of what it sends and receives in the whole run.

{workers_table(found)}

Of these, by the sizes that a worker may send and receive, the lowest loss at the end:

{map_table(found)}

{filled(workers_told(found))}

"""


def workers_table(found: dict[int, dict[str, Result]]) -> str:
    """Of every point and number of workers the loss at the end, over uncompressed, and sizes."""
    counts = sorted(found)
    rows = [["setting", *(f"{n} workers: {what}" for n in counts for what in ("end", "sizes"))]]
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
    """For every number of workers and of sizes the point with the lowest loss at the end."""
    rows = [["sizes at most", *(f"{n} workers" for n in sorted(found))]]
    for budget in BUDGETS:
        cells = []
        for n in sorted(found):
            compressed = (one for name, one in found[n].items() if name != "identity")
            within = (one for one in compressed if all_of(one) <= budget)
            best = min(within, key=lambda one: mean(one.final), default=None)
            cells.append(f"{best.label} ({mean(best.final):.4f})" if best else "none")
        rows.append([str(budget), *cells])
    return markdown(rows, text_columns=len(rows[0]))


def workers_told(found: dict[int, dict[str, Result]]) -> str:
    """What a round every 30 steps costs more workers, and with one how often it costs little."""
    told = []
    for n, of_many in sorted(found.items()):
        if {"identity", "local30-top30", "local10-top30"} <= of_many.keys():
            every_30, every_10 = (
                f"{of_many[name].over(of_many['identity']):+.1f} %"
                for name in ("local30-top30", "local10-top30")
            )
            told.append(f"{n} workers, of {SEQUENCES // n} sequences each, {every_30} ({every_10})")
    return (
        f"Over their own uncompressed runs a round every 30 steps (every 10) costs {listed(told)}."
    )
