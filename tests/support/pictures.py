"""Figures that are drawn again, beside the committed ones."""

import io
import re

import numpy as np

from training.drawing import matplotlib
from training.picture import STYLE

NUMBER = r"-?\d+\.\d+"


def drawn_as_committed(figure, svg):
    """Whether a figure is that of a file, but for a point, by which machines and layouts differ."""
    with matplotlib.rc_context(STYLE):
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    (mine, numbers), (theirs, committed) = map(parts, (drawn.getvalue(), svg.read_text()))
    return mine == theirs and np.allclose(numbers, committed, atol=1)


def parts(svg):
    """What is drawn, and where; without names, which are of both."""
    svg = re.sub(r"\b[a-z][0-9a-f]{10}\b", "", svg)
    return re.split(NUMBER, svg), [float(number) for number in re.findall(NUMBER, svg)]
