"""Modules and names of the last release, at their new places. They go with the next release.

An old module is made when it is imported. Each name taken out of it comes from where it is now, and
one warning says where that is.
"""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Old module -> new one, under megatron_lowbit: those that pages and messages named.
MODULES = {
    "calibration.run": "calibration.calibration_loop",
    "codecs.asymmetric": "codecs.peers.asymmetric_groups",
    "codecs.candidates": "codecs.experiments.candidates",
    "codecs.fp4": "codecs.peers.fp4",
    "codecs.grouped": "codecs.peers.group_frame",
    "codecs.symmetric": "codecs.peers.symmetric_groups",
    "comm.choice": "comm.policy.policy",
    "comm.cost_model": "benchmark.prediction.cost_model",
    "comm.policy.cost_model": "benchmark.prediction.cost_model",
    "comm.policy.probe": "benchmark.prediction.probe",
    "comm.probe": "benchmark.prediction.probe",
    "comm.sequence": "comm.reduce_scatter",
    "comm.symmetric": "comm.symmetric_memory",
    "comm.tuning": "comm.policy.tuning",
    "evaluation.language_model": "model.logits",
    "evaluation.measure": "evaluation.measures.measure",
    "integration.choices": "integration.assignment",
    "integration.cpu_attention": "integration.cpu.attention",
    "integration.cpu_training": "integration.cpu.training",
    "integration.launcher": "integration.runtime.launcher",
    "integration.megatron_args": "integration.runtime.megatron_args",
    "integration.routes": "integration.sums.routes",
    "integration.simulate": "integration.sums.simulate",
    "integration.summing": "integration.sums.over_ranks",
    "integration.sync_points": "integration.sums.sync_points",
    "integration.transformer_engine": "integration.sums.transformer_engine",
    "kernels.build": "kernels.cpu.build",
}
# New module -> {old name: new name, or that of another module}.
NAMES = {
    "calibration.index": {"Index": "CalibrationIndex"},
    "calibration.recipe": {"CodecChoice": "Assignment"},
    "comm.policy.policy": {
        "Chooser": "Policy",
        "make_chooser": "comm.policy.making.make_policy",
        "make_policy": "comm.policy.making.make_policy",
    },
    "comm.traffic": {"Choice": "Decision"},
    "integration.assignment": {"Chosen": "AssignedPoints", "choose": "assign"},
}
_PACKAGE = "megatron_lowbit."


def renamed(module: str):
    """The ``__getattr__`` of a module some of whose names have changed."""

    def take(name: str):
        new = NAMES[module.removeprefix(_PACKAGE)].get(name)
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        there, _, own = f"{_PACKAGE}{new}".rpartition(".") if "." in new else (module, "", new)
        _warn(f"{module}.{name}", f"{there}.{own}", 3)
        return getattr(import_module(there), own)

    return take


class _Finder(MetaPathFinder, Loader):
    """Finds old modules, last of all finders."""

    def find_spec(self, fullname, path=None, target=None):
        old = fullname.removeprefix(_PACKAGE)
        if old == fullname or old not in MODULES:
            return None
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        new = _PACKAGE + MODULES[module.__name__.removeprefix(_PACKAGE)]
        _warn(module.__name__, new, 2)
        module.__dict__["__getattr__"] = lambda name: getattr(import_module(new), name)


def _warn(old: str, new: str, depth: int) -> None:
    text = f"{old} is now {new}; the old name goes with the next release"
    warnings.warn(text, FutureWarning, stacklevel=depth + 1)


def install() -> None:
    """Let old modules be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
