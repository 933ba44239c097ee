"""Names of Megatron's modules, bound to something else.

`rebound` and `bind_in_method` do it for as long as one call takes: for sums that Megatron's code
makes in the middle of a method, through a name that its module has imported by value: within
`rebound` that one method sums by ours, and no other caller ever does. `rebind` replaces a function
for good, wherever it is bound.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from megatron_lowbit.errors import LowbitError


@contextmanager
def rebound(module: ModuleType, **values: Any) -> Iterator[None]:
    """Within the context `module` has `values` for the names that it has already."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


def bind_in_method(owner: Any, method: str, module: ModuleType, **values: Any) -> Callable:
    """From now on `owner.method` runs with `values` in the place of `module`'s names.

    Returns:
        What undoes it.

    Raises:
        LowbitError: `owner` or `module` has no such name in this release of Megatron.
    """
    for where, name in ((owner, method), *((module, name) for name in values)):
        if not hasattr(where, name):
            kind = where.__name__ if where is module else type(where).__name__
            raise LowbitError(
                f"this megatron-core has no {kind}.{name}: its sums cannot be taken over"
            )
    original = getattr(owner, method)

    def bound(*args: Any, **kwargs: Any) -> Any:
        with rebound(module, **values):
            return original(*args, **kwargs)

    setattr(owner, method, bound)  # an attribute of the instance, before the class's method
    return lambda: delattr(owner, method)


def rebind(original: Callable, replacement: Callable) -> None:
    """Put `replacement` in the place of `original` in every module of Megatron that binds it.

    Megatron imports many functions by value. A module that is imported later, such as a script,
    takes the replacement from the module that defines the function.
    """
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "megatron":
            continue
        for attribute, value in list(vars(module).items()):
            if value is original:
                setattr(module, attribute, replacement)
