"""EF21-Muon on two workers with options that have everything in them, to be run and simulated.

Run by torchrun with a file, rank 0 writes there what `on_two_workers` returns.
"""

import sys

import torch
import torch.distributed as dist

from ef21_muon.compressors.base import Identity
from ef21_muon.compressors.rare import Scaled
from ef21_muon.compressors.sparse import TopK
from ef21_muon.norms.lmo import AdaptiveRadius
from scripts.theory.algorithm import train
from scripts.theory.problems import geometry
from scripts.theory.studies import GEOMETRIES, feedback, two_workers
from training.workers import exit_process

HOW = {"problem": two_workers(), "rounds": 20, "replicas": 2, "sigma": 0.5}


def options(place):
    """Everything that there is: of both theorems."""
    first = place == "spectral"
    return {
        "norm": geometry(place, 4, 4).norm,
        "w2s": TopK(0.25),
        "s2w": Scaled(Identity(), 0.5) if first else Identity(),
        "momentum": 0.5,
        "radius": AdaptiveRadius(20.0, 0.0) if first else 0.01,
        "first_message": "full" if first else "compressed",
    }


def on_two_workers():
    """Of EF21Muon: the options of each geometry, and the feedback variants."""
    runs = {place: train(**HOW, **options(place)) for place in GEOMETRIES}
    return runs, feedback(two_workers(), 2, 0.1, 150)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = on_two_workers()
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    dist.destroy_process_group()
    exit_process(0)
