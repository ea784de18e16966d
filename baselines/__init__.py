"""What EF21-Muon is compared with."""

from baselines.allreduce import AdamW, AllReduced, Muon

__all__ = ["AdamW", "AllReduced", "Muon"]
