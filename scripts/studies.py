"""What folders of results/ are made with: logs, tables, pages of templates, a command line."""

import argparse
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path

from training.workers import RunError

PLACE = re.compile(r"\{(\w+)([^{}]*)\}")
# An option of `command`, for studies that take overrides as train.py does.
OVERRIDES = {"overrides": {"nargs": "*", "metavar": "KEY=VALUE", "help": "Hydra overrides"}}


def read_records(path: Path) -> list[dict]:
    """The whole records of a JSONL file, in order; none if there is no such file."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Write a JSONL file, line by line as the records come, so that a stopped run keeps its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
            file.flush()


def select(records: Iterable[dict], **fields) -> list[dict]:
    """The records with these fields."""
    return [record for record in records if fields.items() <= record.items()]


def markdown(rows: Sequence[Sequence[str]], text_columns: int | Container[int] = 1) -> str:
    """A Markdown table of rows of text, whose first is the heading; numbers stand to the right.

    text_columns: how many of the first columns are text, or which columns are.
    """
    heading, *body = rows
    text = range(text_columns) if isinstance(text_columns, int) else text_columns
    rule = ["---" if place in text else "---:" for place in range(len(heading))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *body))


def fill(template: str, values: Mapping[str, object]) -> str:
    """The template with a value in every place, its paragraphs wrapped where a place stood in them.

    A place is {word}, for a text or a number, or {word name name ...}, for what a function says of
    each name, as a sentence lists it: "a, b and c".

    Raises:
        ValueError: A place has a word that `values` lacks.

    Example:
        >>> fill("Gaps are {gap rank20 rank5}.", {"gap": {"rank20": "1 %", "rank5": "2 %"}.get})
        'Gaps are 1 % and 2 %.'
    """

    def value(place: re.Match) -> str:
        word, names = place[1], place[2].split()
        if word not in values:
            raise ValueError(f"{place[0]} of the template is none of {', '.join(sorted(values))}")
        found = values[word]
        return listed(list(map(found, names))) if callable(found) else str(found)

    def filled(part: str) -> str:
        text = PLACE.sub(value, part)
        return textwrap.fill(text, 100, break_on_hyphens=False) if is_prose(part) else text

    return "\n\n".join(map(filled, template.split("\n\n")))


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph of a template is sentences with places in them, to be wrapped again."""
    if PLACE.fullmatch(paragraph.strip()) or paragraph.startswith(("|", "#", "!")):
        return False
    return PLACE.search(paragraph) is not None


def listed(parts: Sequence[str]) -> str:
    """Parts as a sentence has them: a, b and c."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def page(report: Callable[[list[dict]], str], name: str = "README.md") -> Callable:
    """What `command` takes to draw one page, by a function that gives its text."""

    def draw(records: list[dict], folder: Path) -> str:
        text = report(records)
        (folder / name).write_text(text)
        return text

    return draw


def command(
    description: str,
    log: Path,
    measure: Callable[[argparse.Namespace], Iterable[dict]],
    draw: Callable[[list[dict], Path], str],
    options: Mapping[str, dict] | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """The main program of a study: measure into its log, then draw from the log alone.

    Args:
        description: The script's docstring.
        log: Where records are kept; --out takes another folder.
        measure: Yields records, given the options. --redraw leaves it out.
        draw: Writes pages and figures of the records into a folder, and says what to print.
        options: Further ones, with what argparse.add_argument takes of each.
        arguments: Of the command line; sys.argv's by default.

    Returns:
        The exit status: 1 after an error, which is printed in one line.
    """
    parser = argparse.ArgumentParser(
        description=description.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, given in (options or {}).items():
        parser.add_argument(name, **given)
    parser.add_argument("--out", metavar="DIR", type=Path, default=log.parent, help="folder")
    parser.add_argument("--redraw", action="store_true", help=f"from DIR/{log.name} alone")
    chosen = parser.parse_intermixed_args(arguments)
    try:
        if not chosen.redraw:
            write_records(chosen.out / log.name, measure(chosen))
        print(draw(read_records(chosen.out / log.name), chosen.out))
    except (RunError, ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
