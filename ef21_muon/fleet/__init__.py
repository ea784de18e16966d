"""Workers that come and go: a transport for LocalSteps. Needs torchft, an extra."""

from ef21_muon.fleet.admission import FleetError, FleetRefused
from ef21_muon.fleet.fleet import Fleet

__all__ = ["Fleet", "FleetError", "FleetRefused"]
