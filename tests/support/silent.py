"""Stands in for an optimizer: what GradientComputation needs of one, with no timer and no mesh."""

from contextlib import nullcontext


class Silent:
    mesh = correction = None
    timer = global_params = nullcontext

    def __init__(self, **more):
        vars(self).update(more)
