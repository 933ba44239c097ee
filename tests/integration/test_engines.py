"""Megatron's inference engines in low bits, on each supported release, at TP 2 over Gloo.

The model is small and random, in fp32, where static and dynamic engine give the same greedy tokens.
"""

import re
from pathlib import Path

import pytest
import torch
from engines_worker import ALONE, DYNAMIC_INSIDE, NEW_TOKENS, PROMPTS
from forks import forked
from releases import OLDER, RELEASES, environment, is_release
from small_gpt import LAYERS

HERE = Path(__file__).parent


# The engines themselves on every release, all the rest on these: a release takes 10 s to import.
BRIEF = [release for release in RELEASES if release < "0.16"]


@pytest.fixture(scope="module", params=RELEASES)
def release(request):
    return request.param


@pytest.fixture(scope="module")
def ranks(release, tmp_path_factory):
    """What each of 2 ranks saw."""
    return _seen("engines_worker.py", release, BRIEF, tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def graphed(release, tmp_path_factory):
    """What each of 2 ranks saw of engines with CUDA graphs."""
    return _seen("graphs_worker.py", release, OLDER, tmp_path_factory.mktemp("graphs"))


def _seen(worker: str, release: str, brief: list[str], out: Path) -> list[dict]:
    options = ["--brief"] if release in brief else []
    done = forked(2, HERE / worker, out, *options, env=environment(release))
    assert done.returncode == 0, done.stderr[-4000:]
    results = [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    assert is_release(results[0]["version"], release)
    return results


@pytest.fixture
def all_of_it(ranks):
    """The same, or a skipped test where only the engines themselves ran."""
    if "bf16" not in ranks[0]:
        pytest.skip("of this release the engines themselves only")
    return ranks


@pytest.fixture
def all_graphed(graphed):
    if "in turn" not in graphed[0]:
        pytest.skip("of this release graphs of decoding only")
    return graphed


def _needs(ranks, feature: str) -> None:
    if feature not in ranks[0]["features"]:
        pytest.skip(f"this release has no {feature}")


def test_releases_have_what_is_tested(ranks):
    """So that no feature is skipped by mistake."""
    minor = int(ranks[0]["version"].split(".")[1])
    expected = [
        (14, "sequence parallelism"),
        (15, "chunked prefill"),
        (16, DYNAMIC_INSIDE),
        (17, "prefix caching"),
        (17, "speculative decoding"),
        (19, "MegatronLLM"),
    ]
    assert ranks[0]["features"] == [name for since, name in expected if minor >= since]


@pytest.mark.support("dynamic inference engine")
def test_the_dynamic_engine_on_a_cpu_gives_the_static_engines_tokens(ranks):
    for rank in ranks:
        assert rank["native"]["dynamic"] == rank["native"]["static"]
        assert [len(tokens) for tokens in rank["native"]["static"]] == [NEW_TOKENS] * len(PROMPTS)


def test_low_bits_are_seen_in_the_tokens(ranks):
    assert ranks[0]["low"]["dynamic"] != ranks[0]["native"]["dynamic"]


@pytest.mark.support("static inference engine")
@pytest.mark.support("dynamic inference engine")
def test_engines_agree_in_low_bits(ranks):
    for rank in ranks:
        assert rank["low"]["dynamic"] == ranks[0]["low"]["static"]


@pytest.mark.support("static engine around a dynamic one")
def test_the_static_engine_around_a_dynamic_one(ranks):
    _needs(ranks, DYNAMIC_INSIDE)
    for rank in ranks:
        assert rank["low"]["has_dynamic_inside"], "Megatron falls back with a warning only"
        assert rank["low"]["static, dynamic inside"] == ranks[0]["low"]["static"]


def test_the_high_level_api(ranks):
    """`MegatronLLM` without a coordinator, every rank calling it."""
    _needs(ranks, "MegatronLLM")
    for rank in ranks:
        assert rank["low"]["MegatronLLM"] == ranks[0]["low"]["dynamic"]


@pytest.mark.support("static inference engine")
@pytest.mark.support("dynamic inference engine")
def test_tokens_do_not_depend_on_the_batch(ranks):
    """Nor on the padding to the longest prompt, or to a multiple of 64 tokens."""
    for rank in ranks:
        low = rank["low"]
        assert low["static alone"] == low["static"][:ALONE]
        assert low["dynamic alone"] == low["dynamic"][:ALONE]


@pytest.mark.support("error feedback")
def test_errors_are_carried_in_every_step(ranks):
    """So all tokens of this page are with it: chunked, padded, cached, guessed, split alike."""
    for rank in ranks:
        found = [rank["low"], rank["sequence_parallel"], rank.get("bf16", {})]
        found.append(rank.get("speculative", {}))
        for result in filter(None, found):
            carried = result["feedback"]
            assert carried["sync_points"] == 2 * LAYERS
            assert carried["bytes"] > 0
            assert carried["dropped"] == 0


def test_bf16(all_of_it):
    for rank in all_of_it:
        result = rank["bf16"]
        assert result["dynamic"] == all_of_it[0]["bf16"]["dynamic"]
        assert result["alone"] == result["dynamic"][:ALONE]
        assert result["chunked"] == result["dynamic"]


@pytest.mark.support("dynamic engine: chunked prefill")
def test_chunked_prefill(ranks):
    """Steps of 64 tokens, in which prompts are cut and mixed with others' decoding."""
    _needs(ranks, "chunked prefill")
    for rank in ranks:
        assert rank["low"]["chunked"] == ranks[0]["low"]["dynamic"]
        assert rank["low"]["chunked sums"] == ranks[0]["low"]["chunked sums"]
        sizes = [tokens for tokens, _ in rank["low"]["chunked sums"]]
        assert max(sizes) == 64
        assert min(sizes) < 64
        assert sizes.count(64) >= 3 * 2 * LAYERS, "more prompt tokens than two steps take"


@pytest.mark.support("dynamic engine: prefix caching")
def test_prefix_caching(ranks):
    """Blocks that another request has filled are not computed again; the tokens stay."""
    _needs(ranks, "prefix caching")
    for rank in ranks:
        assert rank["low"]["prefix"] == ranks[0]["low"]["dynamic"]
        assert rank["low"]["prefix skipped"] == 24


@pytest.mark.support("dynamic engine: speculative decoding")
def test_speculative_decoding(ranks):
    """Guesses cost sums of more tokens a step, and change no token; the heads stay native."""
    _needs(ranks, "speculative decoding")
    for rank in ranks:
        result = rank["speculative"]
        assert result["guessing"] == ranks[0]["speculative"]["plain"]
        assert result["alone"] == result["guessing"][:ALONE]
        assert result["plain"] != result["native"], "low bits are seen"
        assert 0 < result["accepted"] < result["proposed"]
        assert result["forwards"] < NEW_TOKENS
        assert len(result["heads"]) == 2


def test_every_sum_of_every_step_is_counted(ranks):
    for rank in ranks:
        points = rank["low"]["stats"]["sync_points"]
        assert len(points) == 2 * LAYERS
        for point in points:
            (choice,) = point["choices"]
            assert choice["collective"] == "one-shot"
            assert choice["calls"] == rank["low"]["forwards"] > NEW_TOKENS


def test_auto_chooses_alike_on_all_ranks_at_every_step(all_of_it):
    """By size: steps of prefill in low bits, steps of decoding natively, by this tuning file."""
    first = all_of_it[0]["tuned"]
    chosen = {entry for entry in first["seen"] if entry != "forward"}
    assert {collective for _, collective in chosen} == {"native", "one-shot"}
    assert len({tokens for tokens, _ in chosen}) == len(chosen), "one choice for each size"
    for rank in all_of_it:
        assert rank["tuned"]["seen"] == first["seen"]
        assert rank["tuned"]["tokens"] == first["tokens"]
        counted = {c["collective"]: c["calls"] for c in rank["tuned"]["stats"]["total"]}
        for collective in ("native", "one-shot"):
            sums = [e for e in first["seen"] if e != "forward" and e[1] == collective]
            assert counted[collective] == len(sums)


@pytest.mark.support("dynamic engine: sequence parallel")
def test_sequence_parallelism(ranks):
    """A reduce-scatter quantizes what the one-shot all-reduce does: the same tokens."""
    _needs(ranks, "sequence parallelism")
    for rank in ranks:
        result = rank["sequence_parallel"]
        assert result["native"] == rank["native"]["dynamic"]
        assert result[None] == ranks[0]["low"]["dynamic"]
        assert result[6] == ranks[0]["sequence_parallel"][6]
        for gather, collectives in ((None, ["reduce-scatter"]), (6, None)):
            total = result[gather, "stats"]["total"]
            expected = collectives or ["reduce-scatter", "all-gather"]
            assert [choice["collective"] for choice in total] == expected
            assert len({choice["calls"] for choice in total}) == 1
            alone = result[gather, "alone"]
            assert alone == result[gather][:ALONE]


@pytest.mark.support("dynamic inference engine")
def test_remove_gives_the_native_tokens_back(ranks):
    for rank in ranks:
        assert rank["after"] == rank["native"]["dynamic"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("not captured", "no error"),
        ("captured before", r"apply\(\) would not reach the CUDA graphs that decoder\.layers\.0"),
        ("captured after", r"remove\(\) would not reach .* delete_cuda_graphs\(\)"),
        ("graphed", "no error"),
        ("gathers", "--lowbit-all-gather uses forward pre-hooks, .* refuse in training"),
        ("warm-up", "(cuda_graph_warmup_steps is 0.*){2}"),
        ("whole steps", r"remove\(\) would not reach the CUDA graph of whole training steps"),
    ],
)
def test_cuda_graphs(all_of_it, case, message):
    for rank in all_of_it:
        assert re.search(message, rank["graphs"][case]), rank["graphs"][case]
        assert "4 sync points" in rank["graphs"]["still there"], (
            "a refused remove() changes nothing"
        )
        assert rank["graphs"]["attributes"], "Megatron's own names"


@pytest.mark.support("dynamic engine: CUDA-graphed decode (on a stand-in)")
def test_graphed_decode(graphed):
    """A step of prefill sums in Python, one of decoding only replays a graph a layer."""
    for rank in graphed:
        result, sums = rank["decode"], 2 * LAYERS
        assert result["tokens"] == graphed[0]["decode"]["eager"]
        steps = result["seen"].count("forward")
        prefills, rest = divmod(len(result["seen"]) - steps, sums)
        assert (rest, prefills > 0) == (0, True)
        replayed = steps - prefills
        assert replayed >= NEW_TOKENS - 1
        assert result["replays"] == LAYERS * replayed
        captured = _captured(result["stats"])
        assert captured == _captured(result["stats of the capture"]), "replays are not counted"
        assert (captured["calls"], captured["seconds"]) == (sums, 0)
        assert result["sent_bytes"] == replayed * captured["sent_bytes"] > 0
        assert (result["feedback"]["sync_points"], result["feedback"]["dropped"]) == (sums, 0)


def _captured(stats: dict) -> dict:
    """What statistics say of the sums in CUDA graphs."""
    why = "fixed, in a CUDA graph: replays are not counted"
    (captured,) = (choice for choice in stats["total"] if choice["why"] == why)
    return captured


@pytest.mark.parametrize("case", ["every step", "block", "sequence parallel", "speculative"])
def test_other_graphs_give_the_tokens_of_eager_steps(all_graphed, case):
    """Of prefill, too; of the whole decoder; with gathers in low bits; with heads that guess."""
    for rank in all_graphed:
        assert rank[case]["tokens"] == all_graphed[0][case]["eager"]
        assert rank[case]["replays"] > 0
        assert rank[case]["sent_bytes"] > 0
        if case == "every step":
            assert set(rank[case]["seen"]) == {"forward"}, "no sum runs in Python"


def test_every_replay_gives_eagers_bits(all_graphed):
    """Megatron's runners, each call once with its graph and once without, on the same input."""
    for rank in all_graphed:
        compared = rank["in turn"]["compared"]
        assert len(compared) >= LAYERS * (NEW_TOKENS - 1)
        assert len({given for *_, given in compared}) == len(compared), "inputs differ"
        assert all(same and untouched for same, untouched, _ in compared)


def test_graphs_can_be_captured_anew(all_graphed):
    """After Megatron's delete_cuda_graphs(), and not before: native ones, then two-shot ones."""
    for rank in all_graphed:
        result = rank["in turn"]
        assert "remove() would not reach the CUDA graphs" in result["remove"]
        assert "apply() would not reach the CUDA graphs" in result["apply"]
        assert result["native eager"] != result["two-shot eager"]
        for case in ("native", "two-shot"):
            assert result[case]["tokens"] == result[f"{case} eager"]
            assert result[case]["replays"] > 0
        assert result["native"]["sent_bytes"] == 0, "by collectives of the backend"


def test_a_capture_refuses_a_sum_that_looks_at_a_value(all_graphed):
    for rank in all_graphed:
        assert rank["waiting"] == "operation not permitted when stream is capturing: aten::item"
