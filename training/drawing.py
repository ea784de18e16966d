"""matplotlib with the backend Agg, whatever backend the environment names, for all pictures.

Notebooks export MPLBACKEND with a backend that may not be installed here, and matplotlib refuses
such a name when it is imported. So all modules that draw import matplotlib's names from here. A
program that has imported matplotlib before keeps its own backend: a Figure is saved without it.
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
