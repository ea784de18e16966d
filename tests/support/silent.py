"""In place of an optimizer: what passes ask of one, of a worker of one rank that times nothing."""

from contextlib import nullcontext


class Silent:
    mesh = correction = None
    timer = global_params = nullcontext

    def __init__(self, **more):
        vars(self).update(more)
