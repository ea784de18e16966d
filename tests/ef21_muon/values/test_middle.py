"""Values in the middle of two powers of two: rounded to the nearest, they go away from zero."""

import torch

from ef21_muon.values import Natural


def test_the_middle_is_rounded_up():
    values = Natural("nearest")
    x = torch.tensor([[[1.5, -6.0, 3.0, 1.4999, -0.75]]])
    found = values.decode(values.encode(x), 1, 5)
    assert found.tolist() == [[[2.0, -8.0, 4.0, 1.0, -1.0]]]
