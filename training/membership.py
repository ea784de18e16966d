"""Who the workers of a run are, as its configuration says it."""

from dataclasses import dataclass

from omegaconf import DictConfig

from training.workers import RunError


@dataclass
class Membership:
    """configs/membership: those but the name are of workers that come and go."""

    name: str
    workers: int | None = None
    worker: int | None = None
    lighthouse: str | None = None
    host: str | None = None


def check_membership(own: DictConfig, resume: str) -> None:
    """Raise RunError for values out of range, and for those of another kind of membership."""
    if own.name == "fixed":
        for key in ("workers", "worker", "lighthouse", "host"):
            if own[key] is not None:
                raise RunError(
                    f"membership.{key}={own[key]} is not allowed with membership={own.name}: "
                    "workers that come and go need membership=torchft"
                )
        return
    for key in ("workers", "worker", "lighthouse"):
        if own[key] is None:
            raise RunError(
                f"membership.{key} has no value: give membership.{key}=VALUE, or start workers "
                "with scripts/fleet.py"
            )
    if own.workers < 1:
        raise RunError(
            f"membership.workers={own.workers} is not allowed: give a whole number of at least 1"
        )
    if not 0 <= own.worker < own.workers:
        raise RunError(
            f"membership.worker={own.worker} is not allowed: give one of 0 to {own.workers - 1}, "
            "each worker another"
        )
    if resume != "auto":
        raise RunError(
            f"resume={resume} is not allowed with membership={own.name}: a worker that "
            "starts again goes on, leave it at auto"
        )
