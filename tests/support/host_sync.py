"""Operations that make the host wait for a device."""

from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique2")


class NoHostSync(TorchDispatchMode):
    """Within it they fail."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        name = operation.overloadpacket.__name__
        assert name not in WAITING, f"{name} makes the host wait"
        return operation(*arguments, **(options or {}))
