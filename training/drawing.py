"""matplotlib as all pictures are drawn with it: by Agg, whatever backend the environment names.

Notebooks export MPLBACKEND with a backend that may not be installed here, and matplotlib refuses
such a name when it is imported. So all that draw import matplotlib's names from here. A program
that has imported matplotlib before keeps its own backend: files of a Figure never need it.
"""

import os

os.environ["MPLBACKEND"] = "Agg"  # read at the import

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

__all__ = [
    "EngFormatter",
    "Figure",
    "Line2D",
    "LogLocator",
    "MaxNLocator",
    "NullLocator",
    "matplotlib",
]
