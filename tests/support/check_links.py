"""Check relative links and anchors in all committed Markdown, as `make lint` does.

Links to other hosts are not followed. Markdown in scripts/ is left out, since it is templates whose
pages are in results/.
"""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]


def blocks(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text())


def links(path: Path) -> Iterator[tuple[int, str]]:
    """The targets of links and pictures, each with the line where its block begins."""
    begin = 0
    for block in blocks(path):
        begin = block.map[0] if block.map else begin  # the cells of a table have none
        for part in block.children or []:
            if target := part.attrGet("href") or part.attrGet("src"):
                yield begin + 1, unquote(str(target))


def anchors(path: Path) -> set[str]:
    """Those that GitHub gives to headings; the second heading of a name has -1 at its end."""
    names: list[str] = []
    for opening, heading in pairwise(blocks(path)):
        if opening.type == "heading_open":
            text = "".join(part.content for part in heading.children or [])
            names.append(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    earlier = [names[:place].count(name) for place, name in enumerate(names)]
    return {f"{name}-{n}" if n else name for name, n in zip(names, earlier, strict=True)}


def complaints(root: Path, paths: Iterable[str]) -> Iterator[str]:
    """One line for every link of these Markdown files, below the root, that leads nowhere."""
    for path in paths:
        for line, link in links(root / path):
            scheme, host, name, _, anchor = urlsplit(link)
            target = (root / path).parent / name if name else root / path
            if scheme or host:
                continue
            if not (target.exists() and target.resolve().is_relative_to(root.resolve())):
                yield f"{path}:{line}: {link} is not in the repository"
            elif anchor and anchor not in anchors(target):
                yield f"{path}:{line}: {link} names no heading"


if __name__ == "__main__":
    command = ["git", "ls-files", "*.md", ":!scripts"]
    listed = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    sys.exit("\n".join(complaints(ROOT, listed)) or 0)
