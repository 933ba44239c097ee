"""What is relied on in megatron-core, as data; on real releases: test_matrix.py."""

import functools
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.compat import Symbol, require


@dataclass
class Config:
    hidden_size: int


class Linear:
    def forward(self, x, group=None):
        def inner():
            return self.explicit_expert_comm

        return inner() or x

    @functools.wraps(forward)
    def wrapped(self, *args, **kwargs):
        return Linear.forward(self, *args, **kwargs)


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """A module named doctored with the classes above."""
    made = ModuleType("doctored")
    made.Config, made.Linear = Config, Linear
    monkeypatch.setitem(sys.modules, "doctored", made)


@pytest.mark.parametrize(
    ("symbol", "lack"),
    [
        (Symbol("doctored", "Linear.forward", ""), None),
        (Symbol("nowhere", "Linear", ""), "nowhere.Linear is missing"),
        (Symbol("doctored", "Row.forward", ""), "doctored.Row.forward is missing"),
        (Symbol("doctored", "Linear.forward", "", parameters=("group",)), None),
        (
            Symbol("doctored", "Linear.forward", "", parameters=("group", "tp")),
            "doctored.Linear.forward takes no parameter tp",
        ),
        # In a function inside it, and under a decorator.
        (Symbol("doctored", "Linear.forward", "", attributes=("explicit_expert_comm",)), None),
        (Symbol("doctored", "Linear.wrapped", "", attributes=("explicit_expert_comm",)), None),
        (
            Symbol("doctored", "Linear.forward", "", attributes=("b", "a")),
            "doctored.Linear.forward does not use the attribute a, b",
        ),
        (Symbol("doctored", "Config", "", fields=("hidden_size",)), None),
        (
            Symbol("doctored", "Config", "", fields=("num_layers",)),
            "doctored.Config has no field num_layers",
        ),
    ],
)
def test_what_is_missing(symbol, lack):
    assert symbol.missing() == lack


def test_all_that_is_missing_is_said_at_once():
    symbols = (Symbol("doctored", "A", "do a"), Symbol("doctored", "B", "do b"))
    message = (
        r"doctored\.A is missing \(needed to do a\); doctored\.B is missing \(needed to do b\); "
        "use a release that megatron_lowbit/integration/README.md lists"
    )
    with pytest.raises(LowbitError, match=message):
        require(symbols)
