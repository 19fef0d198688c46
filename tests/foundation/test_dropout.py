from __future__ import annotations

import pytest
import torch

from scdlkit.foundation._dropout import Dropout


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
def test_drops_with_this_probability_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 301, requires_grad=True)
    y = Dropout(p)(x)
    zero = (y == 0).float()
    assert abs(zero.mean() - p) < 0.004
    assert abs(y.mean() - 1) < 0.01 * (1 + p / (1 - p))
    assert len(y.unique()) == 2
    # neither rows nor columns nor neighbours go together
    assert abs(zero.mean(0) - p).max() < 0.08 and abs(zero.mean(1) - p).max() < 0.15
    assert abs((zero[:, 1:] * zero[:, :-1]).mean() - p * p) < 0.01
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_does_nothing_where_there_is_nothing_to_do():
    x = torch.randn(5, 7)
    assert Dropout(0.3).eval()(x) is x and Dropout(0.0)(x) is x
    assert (Dropout(1.0)(x) == 0).all()
    assert Dropout(0.2)(torch.empty(0, 4)).shape == (0, 4)


def test_follows_the_generator_and_the_type():
    x, drop = torch.randn(33, 5), Dropout(0.2)
    torch.manual_seed(1)
    first, second = drop(x), drop(x)
    torch.manual_seed(1)
    assert torch.equal(drop(x), first) and not torch.equal(first, second)
    assert drop(x.bfloat16()).dtype is torch.bfloat16
