"""The symmetric-memory kernels in Triton's interpreter, over memory that processes share.

`test_triton_kernels` runs this in a process of its own, as `triton_cases`.
"""

import pytest
import symmetric_worker
from ranks import run_ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_bits_are_those_of_the_collectives(ranks, tmp_path):
    (tmp_path / "blocks").mkdir()
    results = run_ranks(ranks, symmetric_worker.run_calls, tmp_path, tmp_path / "blocks")
    assert results == [True] * ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_error_feedback(ranks, tmp_path):
    (tmp_path / "blocks").mkdir()
    results = run_ranks(ranks, symmetric_worker.run_carried, tmp_path, tmp_path / "blocks")
    assert results == [[True] * len(symmetric_worker.CARRIED)] * ranks


def test_a_folded_weight(tmp_path):
    (tmp_path / "blocks").mkdir()
    assert run_ranks(2, symmetric_worker.run_folded, tmp_path, tmp_path / "blocks") == [True] * 2


def test_a_rank_that_never_comes_ends_the_others(tmp_path):
    (tmp_path / "blocks").mkdir()
    results = run_ranks(3, symmetric_worker.run_late, tmp_path, tmp_path / "blocks")
    for late, said in results[:2]:
        # 2 programs, 2 barriers of two-shot, and one of one-shot that ends the call: one peer each.
        assert late >= 4
        assert "a rank did not come in time" in said
    assert results[2] == (0, "")


def _open(directory, fault: str) -> list[dict]:
    (directory / "blocks").mkdir()
    results = run_ranks(2, symmetric_worker.run_opened, directory, directory / "blocks", fault)
    for result in results:
        assert result["same"] == [True] * 3
    return results


def test_short_messages_go_over_it(tmp_path):
    """And long ones do not; bytes are counted as they are sent."""
    results = _open(tmp_path, "")
    row, sum_row = 96 // 2 + 2 * 6, 96 * 6 // 8 + 2 * 6
    for rank, result in enumerate(results):
        assert result["status"] == "on" and result["warned"] == []
        assert result["other codec"] == "off: int4-g32 has no kernels for it"
        mine, way = [3, 2][rank], "fixed, over symmetric memory"  # of 5 tokens
        assert result["sent"] == {
            ("one-shot", way): 2 * row,
            ("two-shot", way): (5 - mine) * row + mine * sum_row,
            ("two-shot", "fixed"): 15 * (row + sum_row),
        }


@pytest.mark.parametrize(
    ("fault", "reason", "warns"),
    [
        ("no GPU", "off: no GPU", False),
        (
            "no memory",
            "off: torch has no symmetric memory here (RuntimeError: no peer access)",
            False,
        ),
        (
            "wrong block",
            "off: its trial failed (RuntimeError: a rank did not come within 0 s)",
            True,
        ),
        (
            "broken kernel",
            "off: its trial failed (TypeError: 'NoneType' object is not callable)",
            True,
        ),
    ],
)
def test_without_it_all_ranks_go_the_other_way(fault, reason, warns, tmp_path):
    """One rank's trouble is everyone's, with its reason."""
    for result in _open(tmp_path, fault):
        assert result["status"] == reason
        assert bool(result["warned"]) == warns
        assert list(result["sent"]) == [("one-shot", "fixed"), ("two-shot", "fixed")]
