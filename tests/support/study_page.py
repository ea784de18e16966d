"""The tables of results/README.md, and what a run in its logs has moved."""

from run import ROOT

PAGE = (ROOT / "results" / "README.md").read_text()


def table_after(heading):
    """The first table below a heading of the page."""
    return first_table(PAGE.split(f"## {heading}\n")[1].split("\n## ")[0])


def first_table(text):
    """Its heading, and its rows, as lists of cells."""
    lines = text.splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("| "))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[0], rows[2:]


def moved(last, size):
    """Sizes sent and received at an evaluation."""
    return (last["w2s_bytes"] + last["received_bytes"]) / size
