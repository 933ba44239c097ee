"""What the integration relies on in megatron-core, and whether this release still has it.

`SYNC_POINTS` and the others are data: one line for each class or function, with the parameters that
are passed to it and the attributes that its code must read or set. `require` looks at the real
objects, never at a version number: a release that nobody has seen either works or is refused by
naming what it lacks, before anything is changed.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from types import CodeType
from typing import Any

from megatron_lowbit.errors import LowbitError


@dataclass(frozen=True)
class Symbol:
    """A class or function of megatron-core that is relied on.

    Attributes:
        module: Where it is imported from.
        name: What it is there; a method as ``Class.method``.
        purpose: What it is needed for, to end the sentence "... is needed to".
        parameters: Names that its signature must take.
        attributes: Names that its own code must read or set on objects.
        fields: Names of fields that it must have as a dataclass.
    """

    module: str
    name: str
    purpose: str
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """What this release lacks of it, in words; None if all is there."""
        try:
            module: Any = importlib.import_module(self.module)
            found = reduce(getattr, self.name.split("."), module)
        except (ImportError, AttributeError):
            return f"{self.module}.{self.name} is missing"
        for what, wanted, present in (
            ("takes no parameter", self.parameters, _parameters),
            ("does not use the attribute", self.attributes, _attributes),
            ("has no field", self.fields, _fields),
        ):
            lacking = set(wanted) - present(found) if wanted else None
            if lacking:
                return f"{self.module}.{self.name} {what} {', '.join(sorted(lacking))}"
        return None


_LAYERS = "megatron.core.tensor_parallel.layers"
_MAPPINGS = "megatron.core.tensor_parallel.mappings"
_LAYER = "megatron.core.transformer.transformer_layer"

SYNC_POINTS = (
    Symbol(_LAYER, "BaseTransformerLayer", "find the layers of a model"),
    Symbol(_LAYER, "TransformerLayer.__init__", "number the layers", attributes=("layer_number",)),
    Symbol(
        "megatron.core.transformer.transformer_config",
        "TransformerConfig",
        "tell whether a calibration index fits a model",
        fields=("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
    ),
    Symbol(
        _LAYERS,
        "RowParallelLinear.__init__",
        "take over the sum of a row-parallel linear",
        attributes=("explicit_expert_comm", "sequence_parallel", "skip_bias_add", "tp_group"),
    ),
    Symbol(
        _LAYERS,
        "RowParallelLinear.forward",
        "have its partial instead of its sum",
        attributes=("explicit_expert_comm", "sequence_parallel", "skip_bias_add"),
    ),
)

ALL_GATHERS = (
    Symbol(
        _LAYERS,
        "ColumnParallelLinear.__init__",
        "take over the all-gather of a column-parallel linear",
        attributes=("explicit_expert_comm", "sequence_parallel", "tp_group"),
    ),
    Symbol(
        _LAYERS,
        "ColumnParallelLinear.forward",
        "give it an input that is gathered already",
        attributes=("explicit_expert_comm",),
    ),
    Symbol(
        _MAPPINGS,
        "copy_to_tensor_model_parallel_region",
        "leave out an all-gather that is switched off",
        parameters=("group",),
    ),
)

CHAINS = (
    Symbol(
        "megatron.core.fusions.fused_bias_dropout",
        "get_bias_dropout_add",
        "tell whether a sum is added to the stream as it is",
    ),
    Symbol(
        _LAYER,
        "TransformerLayer.__init__",
        "tell what adds a sum to the stream",
        attributes=("self_attn_bda", "mlp_bda"),
    ),
)

OBSERVATION = (
    Symbol(
        _MAPPINGS,
        "reduce_from_tensor_model_parallel_region",
        "sum natively while watching",
        parameters=("group",),
    ),
    Symbol(
        _MAPPINGS,
        "scatter_to_sequence_parallel_region",
        "watch under sequence parallelism",
        parameters=("group",),
    ),
)


def require(symbols: Iterable[Symbol]) -> None:
    """Raise unless the megatron-core that is imported has all `symbols`, one of the tuples above.

    Raises:
        LowbitError: With everything that is missing, by name.
    """
    lacking = [(text, symbol.purpose) for symbol in symbols if (text := symbol.missing())]
    if lacking:
        listed = "; ".join(f"{text} (needed to {purpose})" for text, purpose in lacking)
        raise LowbitError(
            f"this megatron-core{_version()} is not supported: {listed}; use a release that "
            "megatron_lowbit/integration/README.md lists"
        )


def _version() -> str:
    version = getattr(sys.modules.get("megatron.core"), "__version__", None)
    return f" {version}" if version else ""


def _parameters(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)


def _attributes(function: Callable) -> set[str]:
    """Names of attributes that the code of `function` reads or sets, nested functions included."""
    return _names(inspect.unwrap(function).__code__)


def _names(code: CodeType) -> set[str]:
    nested = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*nested)


def _fields(kind: type) -> set[str]:
    return set(getattr(kind, "__dataclass_fields__", ()))
