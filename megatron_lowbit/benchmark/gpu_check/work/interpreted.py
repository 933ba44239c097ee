"""CPU tensors through Triton's interpreter, where there is no GPU."""

from collections.abc import Callable

from megatron_lowbit.kernels import select


def interpret() -> None:
    """From now on CPU tensors go the way of GPU tensors: for Triton's interpreter."""
    select._kind = lambda *tensors: "cuda"
    select._trouble = lambda: ""
    _patch_once_a_launch()


def _patch_once_a_launch() -> None:
    """Spare the interpreter 0.4 of its time.

    It puts its functions in place of Triton's at each launch, and again wherever a kernel calls a
    function, which changes nothing more.
    """
    from triton.runtime import interpreter

    patch, language = interpreter._patch_lang, interpreter.tl

    def patch_what_is_left(function: Callable) -> object:
        plain = [m for m in (language, language.core) if language.core.is_builtin(m.load)]
        seen = map(id, function.__globals__.values())
        return None if {id(module) for module in plain}.isdisjoint(seen) else patch(function)

    interpreter._patch_lang = patch_what_is_left
