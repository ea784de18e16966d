"""EF21-Muon: a communication-efficient, LMO-based optimizer with error feedback.

The optimizer of "Error Feedback for Muon and Friends" (arXiv:2510.00643), local steps around any
torch optimizer, and averaged gradients, as a library that depends on torch alone.

    EF21Muon            Muon, Scion or Gluon with compressed messages, one round per step
    LocalSteps          DiLoCo and its relatives: one round per `sync_every` steps
    AveragedGradients   any torch optimizer on the mean of the workers' gradients
    param_groups        a model's parameters by role, with the norm of each
    WorkerMesh          workers of several ranks, whole or sharded by torch's fully_shard
    norms, compressors, values      what these optimizers are built from
"""

from typing import TYPE_CHECKING

from ef21_muon import compressors, norms, values
from ef21_muon.averaged import AveragedGradients
from ef21_muon.checks.renamed import CLASSES
from ef21_muon.local_steps import LocalSteps
from ef21_muon.norms.presets import param_groups
from ef21_muon.optimizer import EF21Muon
from ef21_muon.transport.fixed import ALONE
from ef21_muon.transport.mesh import WorkerMesh, new_mesh

__version__ = "0.1.0"
__all__ = [
    "ALONE",
    "AveragedGradients",
    "EF21Muon",
    "LocalSteps",
    "WorkerMesh",
    "compressors",
    "new_mesh",
    "norms",
    "param_groups",
    "values",
]


if not TYPE_CHECKING:  # which would take any name for an attribute

    def __getattr__(name: str) -> object:
        """Refuse names of earlier versions, by an ImportError, and unknown ones."""
        new = {
            one: f"{m.__name__}.{one}" for m in (compressors, norms, values) for one in m.__all__
        }
        new |= {old: f"ef21_muon.{one}" for old, one in CLASSES.items()}
        if name in new:
            raise ImportError(f"ef21_muon.{name} has been renamed, give {new[name]}")
        raise AttributeError(f"module 'ef21_muon' has no attribute {name!r}")
