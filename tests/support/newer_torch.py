"""What torch has only since a version after the oldest that pyproject.toml allows."""

import torch

OTHER_TYPES = hasattr(torch.Tensor, "grad_dtype")  # gradients of another type than the parameter's


def flattens_tables() -> bool:
    """Whether flatten_optimizer_state_dict=True is for states with dictionaries in them, too."""
    from torch.distributed.checkpoint.state_dict import _flatten_optim_state_dict

    try:
        _flatten_optim_state_dict(
            {"state": {"weight": {"table": {"entry": 1}}}, "param_groups": []}
        )
    except NotImplementedError:
        return False
    return True
