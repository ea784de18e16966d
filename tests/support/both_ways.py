"""EF21-Muon on two workers with a setting that has everything in it, to be run and simulated."""

from ef21_muon.compressors.base import Identity
from ef21_muon.compressors.rare import Scaled
from ef21_muon.compressors.sparse import TopK
from ef21_muon.norms.lmo import AdaptiveRadius
from scripts.theory.algorithm import Setting, train
from scripts.theory.problems import geometry
from scripts.theory.studies import GEOMETRIES, feedback, two_workers


def compared(place):
    """A problem and a setting with everything in it, for both ways to run it."""
    setting = Setting(
        norm=geometry(place, 4, 4).norm,
        w2s=TopK(0.25),
        beta=0.5,
        radius=AdaptiveRadius(20.0, 0.0) if place == "spectral" else 0.01,
        s2w=Scaled(Identity(), 0.5) if place == "spectral" else Identity(),
        first_message="full" if place == "spectral" else "compressed",
        sigma=0.5,
    )
    return two_workers(), setting, 30, 3


def on_two_workers():
    """Of EF21Muon: the cases of `compared` and the feedback variants."""
    runs = {place: train(*compared(place)) for place in GEOMETRIES}
    return runs, feedback(two_workers(), 2, 0.1, 150)
