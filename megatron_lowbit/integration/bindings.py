"""Replacing a function of Megatron's under every name that it has."""

import sys
from collections.abc import Callable


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
