"""Low-bit tensor-parallel communication for Megatron-core inference.

Public names, imported on first use so that a bare ``import megatron_lowbit`` touches neither
CUDA, Triton nor Megatron:

    apply           switch a Megatron model's sync points to the low-bit path (needs megatron-core)
    Settings        which collectives `apply` takes: a mode, a tuning file, nodes
    all_reduce      sum a tensor over a process group through a codec (needs only torch)
    reduce_scatter  the same, each rank its own block of the first axis
    all_gather      put the tensors of all ranks together
    ErrorFeedback   what one sum could not send goes along with the next one
    get_codec       a codec by name and bits
    register_route  how a fork's own row-parallel linears hand over their partials
    LowbitError     the base of the package's errors
"""

from importlib import import_module

from megatron_lowbit import _moved
from megatron_lowbit._version import __version__

_EXPORTS = {
    "apply": "megatron_lowbit.integration.apply",
    "Settings": "megatron_lowbit.comm.policy.policy",
    "all_reduce": "megatron_lowbit.comm",
    "reduce_scatter": "megatron_lowbit.comm",
    "all_gather": "megatron_lowbit.comm",
    "ErrorFeedback": "megatron_lowbit.comm.feedback.chain",
    "get_codec": "megatron_lowbit.codecs",
    "register_route": "megatron_lowbit.integration.sums.routes",
    "LowbitError": "megatron_lowbit.errors",
}

__all__ = ["__version__", *_EXPORTS]
_moved.install()


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'megatron_lowbit' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
