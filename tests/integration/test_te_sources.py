"""What Transformer Engine's real sources read and send, of which test_transformer_engine.py has a
stand-in.
"""

import ast
import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_lowbit.integration.sums.transformer_engine import MUTED_TE, attributes_read

# The oldest 2.x whose Python sources the registry has, in a package with 528 MB of CUDA kernels.
TE_RELEASE = "2.1.0"


@pytest.fixture(scope="module")
def te_linear() -> str:
    """The source of TE's `Linear`: a checkout's, the installed package's, or in CI the registry's.

    The plain package cannot be installed without CUDA, and what is needed of it is one file.
    """
    path = Path("transformer_engine/pytorch/module/linear.py")
    if "TRANSFORMER_ENGINE" in os.environ:
        return (Path(os.environ["TRANSFORMER_ENGINE"]) / path).read_text()
    found = find_spec("transformer_engine")
    if found is not None:
        return (Path(found.submodule_search_locations[0]).parent / path).read_text()
    kept = Path(sys.prefix) / f"transformer-engine-{TE_RELEASE}" / path
    if not kept.is_file():
        if not os.environ.get("CI"):
            pytest.skip("no Transformer Engine: set TRANSFORMER_ENGINE to a checkout of it")
        _download(kept, str(path))
    return kept.read_text()


def _download(target: Path, member: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir"]
    command += [f"transformer-engine-cu12=={TE_RELEASE}", "--dest", target.parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    wheels = list(target.parent.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"transformer-engine-cu12 {TE_RELEASE} is not to be had: {done.stderr[-300:]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        source = archive.read(member)
    wheels[0].unlink()
    target.write_bytes(source)


def test_the_real_linear_reads_what_is_set_in_its_forward_pass(te_linear):
    module = ast.parse(te_linear)
    (kind,) = (n for n in module.body if isinstance(n, ast.ClassDef) and n.name == "Linear")
    reads = attributes_read(ast.unparse(kind))
    assert set(MUTED_TE) | {"tp_size", "tp_group", "sequence_parallel"} <= reads


def test_the_real_linear_communicates_only_as_row_or_column_parallel(te_linear):
    """Every collective on a tensor-parallel group is behind a condition on `parallel_mode`, or on
    userbuffers, which are refused: nothing that `sequence_parallel` alone would start.
    """
    calls = []

    def visit(node, conditions):
        for child in ast.iter_child_nodes(node):
            here = conditions
            if isinstance(node, ast.If) and child in node.body:
                here = [*conditions, ast.unparse(node.test)]
            if isinstance(child, ast.Call) and ast.unparse(child.func) in (
                "allreduce",
                "symmetric_all_reduce",
                "reduce_scatter_along_first_dim",
                "gather_along_first_dim",
            ):
                calls.append((ast.unparse(child.func), " and ".join(here)))
            visit(child, here)

    visit(ast.parse(te_linear), [])
    assert {"allreduce", "reduce_scatter_along_first_dim"} <= {name for name, _ in calls}
    for name, condition in calls:
        gathers_input = re.search("with_input_all_gather|backward_input_needs_gather", condition)
        assert "parallel_mode" in condition or "ub_" in condition or gathers_input, (
            name,
            condition,
        )


def test_attributes_read_tells_reads_from_writes_and_methods_apart():
    source = """
class Linear:
    def __init__(self):
        self.tp_size = 1
    def forward(self, x):
        self.parallel_mode = None
        return x + self.bias
"""
    assert attributes_read(source) == {"bias"}
