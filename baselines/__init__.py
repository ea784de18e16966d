"""What EF21-Muon is compared with."""

from baselines.allreduce import AdamW, AllReduced, Muon
from baselines.demo import DeMo
from baselines.dion import Dion

__all__ = ["AdamW", "AllReduced", "DeMo", "Dion", "Muon"]
