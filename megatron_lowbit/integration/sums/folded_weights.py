"""Rotations folded into the weights of sync points, and the weights given back bit for bit.

A folded linear gives ``[rotated body | BF16 features]`` (`codecs.folding`), which encoding only
scales and packs. Its parameter stays the same object and holds the folded weight, k rows taller,
and the original is kept in host memory. `state_dict` and with it Megatron's checkpoints see the
original, loading into a folded linear is refused, and leaving the context puts the original back.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from torch import Tensor, nn

from megatron_lowbit.codecs import Tables
from megatron_lowbit.codecs.folding import FOLDABLE, fold
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.integration.sums.routes import is_plain
from megatron_lowbit.integration.sums.sync_points import SyncPoint


class Folding:
    """Folded weights for some sync points; a context manager that puts them in and out.

    Attributes:
        tables: Of each sync point, for the partials that its folded weight makes.
    """

    def __init__(self, points: list[SyncPoint], tables: Sequence[Tables]):
        """Fold what `check_foldable` has passed, by tables of a codec with a rotation.

        Nothing of the model changes before the context is entered.
        """
        self._weights, self.tables = [], []
        for point, table in zip(points, tables, strict=True):
            folded, changed = fold(point.module.weight.data, table)
            self._weights.append((point, folded))
            self.tables.append(changed)

    def __enter__(self) -> "Folding":
        with ExitStack() as undo:  # of those that are in, if one cannot be
            for point, folded in self._weights:
                undo.callback(_put_in(point, folded))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc_info) -> None:
        self._undo.close()


def _put_in(point: SyncPoint, folded: Tensor) -> Callable[[], None]:
    """Put a folded weight in; gives what puts the original back."""
    module, original = point.module, point.module.weight.data.cpu()
    module.weight.data = folded

    def save(module: nn.Module, state_dict: dict, prefix: str, metadata) -> None:
        state_dict[prefix + "weight"] = original.to(folded.device)

    def refuse(*args) -> None:
        raise LowbitError(
            f"the weight of {point} is folded: remove() the low-bit handle before loading"
        )

    hooks = [
        module.register_state_dict_post_hook(save),
        module.register_load_state_dict_pre_hook(refuse),
    ]

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        module.weight.data = original.to(folded.device)

    return undo


def fold_all(points: list[SyncPoint], tables: Sequence[Tables]) -> Folding:
    """The weights of all sync points of a model, with the rotations of `tables` folded in.

    Raises:
        LowbitError: One of them cannot be folded.
    """
    check_foldable([point.module for point in points], points)
    return Folding(points, tables)


def check_foldable(modules: Iterable[nn.Module], points: list[SyncPoint]) -> None:
    """Raise `LowbitError` unless every sync point's weight can be folded.

    `modules` are all that may use such a weight.
    """
    uses = Counter(id(p) for module in modules for p in module._parameters.values())
    for point in points:
        weight = point.module.weight
        if not is_plain(point.module):
            raise LowbitError(
                f"{point} is a {type(point.module).__name__} whose partials go another way than a "
                "local RowParallelLinear's: --lowbit-fold needs the local spec, without overlapped "
                "shared experts"
            )
        # A quantized weight is a subclass of Tensor (Transformer Engine), or of another dtype.
        if type(weight.data) is not Tensor or weight.dtype not in FOLDABLE:
            raise LowbitError(
                f"the weight of {point} is quantized ({type(weight.data).__name__}, "
                f"{weight.dtype}), no rotation can be folded into it: leave --lowbit-fold out"
            )
        if uses[id(weight)] > 1:
            raise LowbitError(
                f"the weight of {point} is shared with another module, which would see it rotated: "
                "leave --lowbit-fold out"
            )
