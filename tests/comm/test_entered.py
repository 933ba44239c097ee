"""What every public collective does before its work: wrong arguments, threads, ranks that differ.

Each with what must not happen: a rank that waits, a sum that is wrong and says nothing.
"""

import os
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from cases import sample
from ranks import on_each_rank, run_ranks
from worker import error_of

from megatron_lowbit.codecs import get_codec
from megatron_lowbit.comm import all_gather, all_reduce, reduce_scatter
from megatron_lowbit.comm.call_check import CHECK_SWITCH, is_checking
from megatron_lowbit.comm.policy.policy import Policy
from megatron_lowbit.errors import LowbitError

ROUNDS = 150


# By name: a collective, its arguments, and what the message must hold.
WRONG = {
    "codec": (all_reduce, {"codec": 3}, "codec=3: give a codec or its name"),
    "codec none": (all_gather, {"codec": None}, "codec=None: give a codec or its name"),
    "codec class": (reduce_scatter, {"codec": type(get_codec())}, "give a codec or its name"),
    "codec name": (all_reduce, {"codec": "int5"}, "unknown codec 'int5': choose one of bf16,"),
    "collective": (all_reduce, {"collective": 3}, "collective=3: give a Policy or one of native"),
    "collective 2": (reduce_scatter, {"collective": ["native"]}, "give a Policy or one of native"),
    "tables": (all_reduce, {"tables": "x"}, "tables='x': give what the codec's tables() makes"),
    "tables 2": (all_gather, {"tables": {}}, "tables={}: give what the codec's tables() makes"),
    "group": (all_reduce, {"group": 3}, "group=3: give a torch.distributed process group"),
    "group 2": (all_gather, {"group": [0, 1]}, "group=[0, 1]: give a torch.distributed process"),
    "not in it": (reduce_scatter, {"group": dist.GroupMember.NON_GROUP_MEMBER}, "is not in the"),
    "traffic": (all_reduce, {"traffic": 3}, "traffic=3: give a Traffic, or none"),
    "below 0": (reduce_scatter, {"counts": [5, -2, 1]}, "counts=[5, -2, 1]: give a list of whole"),
    "a letter": (reduce_scatter, {"counts": ["a"]}, "counts=['a']: give a list of whole"),
    "no list": (reduce_scatter, {"counts": 4}, "counts=4: give a list of whole"),
    "halves": (reduce_scatter, {"counts": [2.5, 1.5]}, "counts=[2.5, 1.5]: give a list of whole"),
    "truths": (reduce_scatter, {"counts": [True, 3]}, "counts=[True, 3]: give a list of whole"),
    "too many": (reduce_scatter, {"counts": [1, 1, 2]}, "do not split 4 tokens over 2 ranks"),
    "no tensor": (all_reduce, {"x": [1.0, 2.0]}, "[1.0, 2.0] is no tensor: give [..., hidden]"),
    "none": (all_gather, {"x": None}, "None is no tensor"),
    "sparse": (all_reduce, {"x": torch.eye(4).to_sparse()}, "need a dense tensor with values"),
    "meta": (reduce_scatter, {"x": torch.empty(4, 8, device="meta")}, "need a dense tensor"),
    "complex": (
        all_reduce,
        {"x": torch.ones(4, 8, dtype=torch.complex64)},
        "cannot send torch.com",
    ),
}


@on_each_rank(2)
def test_a_wrong_argument_is_one_line_on_every_rank(rank):
    """And a group that has sent nothing by then still gives the right sum."""
    for name, (function, call, wanted) in WRONG.items():
        given = {"x": torch.ones(4, 8)} | call
        said = error_of(lambda function=function, given=given: function(**given))
        assert wanted in said and "\n" not in said, (name, said)
    policy = {"collective": Policy("native"), "in_place": True}
    assert "3 is no tensor" in error_of(lambda: all_reduce(3, **policy))
    assert torch.equal(all_reduce(torch.ones(4, 8), codec="bf16"), torch.full((4, 8), 2.0))


def test_without_a_process_group_it_is_said():
    said = error_of(lambda: all_reduce(torch.ones(2)))
    assert "call torch.distributed.init_process_group" in said


@pytest.mark.slow
@on_each_rank(2)
def test_torch_compile_breaks_its_graph_and_goes_on(rank):
    """Twice, and with gradients: the compiled function gives what the function itself gives."""

    def layer(x: torch.Tensor) -> torch.Tensor:
        total = all_reduce(2 * x)
        whole = all_gather(total.sin())
        return reduce_scatter(whole, codec="bf16") + 1

    torch._dynamo.config.suppress_errors = False
    compiled = torch.compile(layer, backend="eager")
    for tokens in (6, 6, 10):
        x = sample("normal", (tokens, 64), rank)
        assert torch.equal(compiled(x), layer(x))
    inputs = [sample("normal", (6, 64), rank).requires_grad_() for _ in range(2)]
    for function, x in zip((compiled, layer), inputs, strict=True):
        function(x).sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


def _together(function: Callable, each: list[tuple]) -> None:
    """A thread for each tuple of arguments, all at once."""
    threads = [threading.Thread(target=function, args=arguments) for arguments in each]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _two_threads(rank: int) -> dict:
    """Two threads with sums of their own on one group: how each ended, and the calls after it."""
    ended, start = {}, time.monotonic()

    def sums(thread: int) -> None:
        x = torch.full((40, 64), thread + 1.0)
        try:
            for _ in range(ROUNDS):
                all_reduce(x, codec="bf16")
            ended[thread] = "no error"
        except (LowbitError, RuntimeError) as error:
            ended[thread] = str(error)

    _together(sums, [(number,) for number in range(2)])
    after = error_of(lambda: all_reduce(torch.ones(2, 64)))
    return {"ended": ended, "after": after, "seconds": time.monotonic() - start}


def test_two_threads_on_one_group_are_refused_on_all_ranks(tmp_path):
    """No thread gets to its end, nobody waits for a timeout, and the group serves no more."""
    refused = 0
    for result in run_ranks(3, _two_threads, tmp_path):
        for error in result["ended"].values():
            # Who is not refused loses a rank that is, in the words of its system.
            assert error != "no error"
            refused += "two threads at once in collectives of group [0, 1, 2]" in error
        assert "two threads" in result["after"] or "an earlier collective" in result["after"]
        assert result["seconds"] < 30
    assert refused


@on_each_rank(2)
def test_threads_that_take_turns_are_served(rank):
    """As a server's do, and two threads with a group each."""
    same = []

    def one_sum(group=None) -> None:
        for _ in range(20):
            total = all_reduce(torch.ones(4, 64), codec="bf16", group=group)
            same.append(torch.equal(total, torch.full((4, 64), 2.0)))

    one_sum()
    for _ in range(3):
        _together(one_sum, [()])
    _together(one_sum, [(dist.new_group(),) for _ in range(2)])
    assert same == [True] * 20 * 6


# By name: what the last of 3 ranks does otherwise than the others, and what all must be told.
DIFFERENT = {
    "shape": ({"x": torch.ones(7, 64)}, "shape (6, 64) on rank 0 and 1, (7, 64) on rank 2"),
    "hidden": ({"x": torch.ones(6, 32)}, "shape (6, 64) on rank 0 and 1, (6, 32) on rank 2"),
    "dtype": ({"x": torch.ones(6, 64).bfloat16()}, "dtype float32 on rank 0 and 1, bfloat16 on"),
    "codec": ({"codec": "bf16"}, "codec rotated-hybrid (4 bits) on rank 0 and 1, bf16 (16 bits)"),
    "bits": ({"codec": get_codec(bits=3)}, "rotated-hybrid (3 bits) on rank 2"),
    "bits of sums": ({"codec": get_codec(bits=(4, 6))}, "rotated-hybrid (4+6 bits) on rank 2"),
    "way": ({"collective": "two-shot"}, "all_reduce one-shot on rank 0 and 1, all_reduce two-shot"),
    "native": ({"collective": Policy("native"), "in_place": True}, "all_reduce native on rank 2"),
    "tables": (
        {"tables": get_codec().tables(64, bf16_index=torch.tensor([3]))},
        "tables none on rank 0 and 1, ",
    ),
    "function": (
        {"function": reduce_scatter},
        "all_reduce one-shot on rank 0 and 1, red",
    ),
    "function 2": ({"function": all_gather}, "all_gather on rank 2"),
    "no codec": ({"codec": None}, "codec rotated-hybrid (4 bits) on rank 0 and 1, None on rank 2"),
    "a mistake": ({"codec": 3}, "codec rotated-hybrid (4 bits) on rank 0 and 1, 3 on rank 2"),
    "no tensor": ({"x": "x"}, "tensor none on rank 0 and 1, 'x' on rank 2"),
}


@on_each_rank(3)
def test_the_check_ends_all_ranks_with_what_differs(rank):
    os.environ[CHECK_SWITCH] = "1"
    for name, (other, wanted) in DIFFERENT.items():
        call = {"x": torch.ones(6, 64), "function": all_reduce} | (other if rank == 2 else {})
        said = error_of(lambda call=call: call.pop("function")(**call))
        assert said.startswith("ranks differ in one call: ") and wanted in said, (name, said)
    counts = [[2, 2, 2], [2, 2, 2], [1, 2, 3]][rank]
    said = error_of(lambda: reduce_scatter(torch.ones(6, 64), counts=counts))
    assert "counts [2, 2, 2] on rank 0 and 1, [1, 2, 3] on rank 2" in said
    index = torch.tensor([3 + (rank == 1)])  # of one size: no payload shows it
    tables = get_codec().tables(64, bf16_index=index)
    assert "on rank 0 and 2" in error_of(lambda: all_reduce(torch.ones(6, 64), tables=tables))
    assert torch.equal(all_reduce(torch.ones(4, 8), codec="bf16"), torch.full((4, 8), 3.0))
    pair = dist.new_group([1, 2])
    if rank:
        said = error_of(lambda: all_reduce(torch.ones(rank, 8), group=pair))
        assert "shape (1, 8) on rank 1, (2, 8) on rank 2" in said


@pytest.mark.parametrize(
    ("value", "wanted"), [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_the_switch(monkeypatch, value, wanted):
    monkeypatch.delenv(CHECK_SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(CHECK_SWITCH, value)
    assert is_checking.__wrapped__() == wanted
    monkeypatch.setenv(CHECK_SWITCH, "yes")
    with pytest.raises(LowbitError, match=f"{CHECK_SWITCH}=yes: choose 0 or 1"):
        is_checking.__wrapped__()
