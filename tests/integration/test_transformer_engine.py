"""Transformer Engine's layers: Megatron's real classes over a stand-in, and TE's real sources."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from forks import forked
from releases import environment

from megatron_lowbit.integration.sums.transformer_engine import MUTED_TE, attributes_read

HERE = Path(__file__).parent
RANKS = 2
# The oldest 2.x whose Python sources the registry has, in a package with 528 MB of CUDA kernels.
TE_RELEASE = "2.1.0"


# The stand-in has what these releases import of Transformer Engine; older ones import other names.
@pytest.fixture(scope="module", params=["0.16.1", "0.19.2"])
def ranks(request, tmp_path_factory):
    """What each of two ranks saw."""
    out = tmp_path_factory.mktemp("te")
    env = environment(request.param)
    paths = [env["PYTHONPATH"], str(HERE.parent), str(HERE / "te_stand_in")]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    done = forked(RANKS, HERE / "te_worker.py", out, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]
    assert results[0]["version"].startswith(request.param)
    return results


def cases(ranks):
    """Each spec but the local one, of each rank: what it gave, and what the local one gave."""
    for rank in ranks:
        for sequence_parallel, names in ((False, ["te"]), (True, ["te", "inference"])):
            found = rank[sequence_parallel]
            for name in names:
                yield sequence_parallel, found[name], found["local"]


def test_low_bits_are_those_of_the_local_spec(ranks):
    """The same partials through the same codec: bit for bit, and on all ranks."""
    for sequence_parallel, result, local in cases(ranks):
        of_rank_0 = ranks[0][sequence_parallel]["te"]["low"]["logits"]
        assert torch.equal(result["low"]["logits"], local["low"]["logits"])
        assert torch.equal(result["low"]["logits"], of_rank_0)
        assert not torch.equal(result["low"]["logits"], result["native"]["logits"])
        assert torch.equal(result["native"]["logits"], local["native"]["logits"])
        assert result["sent"] == local["sent"]
        assert all(calls == 1 and sent > 0 for calls, sent in result["sent"])
        assert f"{2 * ranks[0]['layers']} sync points use rotated-hybrid" in result["text"]
        assert f"errors carried between {2 * ranks[0]['layers']} sync points" in result["text"]


def test_te_sends_nothing_for_as_long_as_it_is_muted(ranks):
    points = 2 * ranks[0]["layers"]
    for sequence_parallel, result, _ in cases(ranks):
        own = "reduce_scatter_along_first_dim" if sequence_parallel else "allreduce"
        assert result["native"]["calls"] == [own] * points
        assert result["low"]["calls"] == []
        assert result["removed"]["calls"] == [own] * points


def test_remove_leaves_nothing(ranks):
    for _, result, _ in cases(ranks):
        assert result["unchanged"], "an attribute or a hook of a module"
        assert result["keys"], "the state_dict's"
        assert torch.equal(result["removed"]["logits"], result["native"]["logits"])


def test_an_index_serves_every_spec(ranks):
    """TE keeps norms in the linears behind them; the weights' digests are the same."""
    for _, result, local in cases(ranks):
        assert result["fingerprints"] == local["fingerprints"]
        assert len(set(local["fingerprints"])) == ranks[0]["layers"]
    assert all(rank[sp]["calibrated"] for rank in ranks for sp in (False, True))


def test_gradients_are_those_of_the_local_spec(ranks):
    """In the backward pass only the column-parallel linears reduce, two in a layer."""
    for rank in ranks:
        for sequence_parallel in (False, True):
            te, local = (rank[sequence_parallel]["gradients"][name] for name in ("te", "local"))
            assert all(torch.equal(a, b) for a, b in zip(te[:-1], local[:-1], strict=True))
            assert all(gradient.abs().sum() > 0 for gradient in te[:-1])
            assert te[-1] == 2 * rank["layers"]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("skip_bias_add", [False, True])
def test_a_bias_is_added_once_after_the_sum(ranks, sequence_parallel, skip_bias_add):
    """Output, bias and all gradients of a linear, muted and summed by Megatron's functions."""
    for rank in ranks:
        result = rank["biases"][sequence_parallel, skip_bias_add]
        for way in ("low", "again"):
            pairs = zip(result[way]["tensors"], result["native"]["tensors"], strict=True)
            assert all(torch.equal(mine, native) for mine, native in pairs), way
        assert len(result["low"]["tensors"]) == 4 + skip_bias_add
        assert result["low"]["scattered"] == sequence_parallel
        assert len(result["native"]["calls"]) == len(result["again"]["calls"]) == 1
        assert result["low"]["calls"] == []


def test_sequence_parallelism_that_is_switched_off_between_calls(ranks):
    """As engines do for decoding: then it all-reduces, as a model that never had it."""
    for rank in ranks:
        result = rank["switched_off"]
        assert torch.equal(result["model"]["logits"], result["plain"]["logits"])
        assert result["model"]["calls"] == []


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("userbuffers", "layer 1 mlp.linear_fc2 sums while .*leave out --tp-comm-overlap"),
        ("fp8", "layer 1 self_attention.linear_proj is padded .* --sequence-parallel"),
        ("no_group", "layer 1 mlp.linear_fc2 has no tensor-parallel group"),
        (
            "missing",
            "layer 1 mlp.linear_fc2 has no gemm_bias_unfused_add.*--transformer-impl local",
        ),
        ("own_forward", "layer 1 mlp.linear_fc2 has a forward pass of its own, .* TunedLinear"),
        ("unread", r"transformer_engine.*\.Linear\.forward reads no parallel_mode"),
        ("gather", "--lowbit-all-gather has nothing to gather"),
        ("simulate", "--simulate-tp needs the local spec .* is a TERowParallelLinear"),
        ("op_fuser", "layer 1 mlp.linear_fc2 .* TEFusedMLP .*--use-transformer-engine-op-fuser"),
        ("fuse_tp", "layer 1 self_attention.linear_proj .*--inference-fuse-tp-communication"),
        ("inference_bias", "layer 2 self_attention.linear_proj adds its bias itself"),
        ("converted", "layer 2 self_attention.linear_proj has its weights as object already"),
        ("fine", "^no error$"),
        ("inference_fine", "^no error$"),
    ],
)
def test_what_cannot_be_done_is_refused_on_every_rank(ranks, case, text):
    for rank in ranks:
        assert re.search(text, rank["refusals"][case]), rank["refusals"][case]


def test_what_stays_native(ranks):
    """A linear that Megatron muted, and the grouped linears of routed experts."""
    muted = ranks[0]["refusals"]["native"]
    assert list(muted) == ["layer 1 mlp.linear_fc2"]
    assert "already muted by Megatron" in muted["layer 1 mlp.linear_fc2"]
    experts = ranks[0]["experts"]
    assert [point.split()[-1] for point in experts["points"]] == 2 * [
        "self_attention.linear_proj",
        "mlp.shared_experts.linear_fc2",
    ]
    assert list(experts["native"]) == [f"layer {n} mlp.token_dispatcher" for n in (1, 2)]


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
