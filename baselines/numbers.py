"""The ranges of hyperparameters, told and checked."""

from ef21_muon.checks import settings as checks

AT_LEAST_0 = "of at least 0", lambda value: value >= 0
BELOW_1 = "of at least 0, below 1", lambda value: 0 <= value < 1
RANGES = {
    "lr": AT_LEAST_0,
    "lion_lr": AT_LEAST_0,
    "weight_decay": AT_LEAST_0,
    "mu": BELOW_1,
    "decay": BELOW_1,
    "betas": BELOW_1,
    "lion_betas": BELOW_1,
    "rank_fraction": ("above 0, at most 1", lambda value: 0 < value <= 1),
}


def check_number(name: str, value: float) -> float:
    """The value as a number of Python's, or ValueError unless it is finite and in its range."""
    return checks.check_number(name, value, RANGES)
