"""Loss by position, needles and generation on models whose answers are known."""

import pytest
import torch
from ranks import on_each_rank
from toys import VOCAB, Words, bigram, contextual, copying, toy

from megatron_lowbit.comm.agreement import require_equal
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.measures.generation import Generation, generate
from megatron_lowbit.evaluation.measures.long_context import LongText, buckets
from megatron_lowbit.evaluation.measures.needles import DEPTHS, Needles
from megatron_lowbit.evaluation.measures.task_data import Item, TaskData
from megatron_lowbit.evaluation.measures.tasks import Task

SOURCE = {"source": "toy.txt", "sha256": "digest"}


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(5))


def needles(count: int, length: int) -> Needles:
    """In texts of a token that is in no needle."""
    return Needles(torch.full((count, length), 80), tokenize=Words().tokenize, **SOURCE)


def records(measure, native, **variants) -> list[dict]:
    """What an evaluation collects, without one."""
    collected = []
    for number in range(len(measure)):
        scores, kept = measure.run(number, native, None)
        record = {"native": scores}
        for name, model in variants.items():
            record[name] = measure.run(number, model, kept)[0]
        collected.append(record)
    return collected


def test_buckets():
    assert buckets(300) == [(0, 300)]
    assert buckets(512) == [(0, 512)]
    assert buckets(8192)[-2:] == [(2048, 4096), (4096, 8192)]
    assert buckets(1100) == [(0, 512), (512, 1024), (1024, 1100)]


def test_loss_and_kl_by_position():
    """A variant that is wrong from position 1024 on, against torch on the whole sequence."""
    exact = contextual(seed=1)
    wrong = contextual(seed=1, noise=0.3)

    def late(sequence):
        logits = exact(sequence)
        logits[:, 1024:] = wrong(sequence)[:, 1024:]
        return logits

    sequences = tokens(2, 1101)
    measure = LongText(sequences, **SOURCE)
    summary = measure.summarize(records(measure, toy(exact), v=toy(late)))
    before, after = (f(sequences[:, :-1]).log_softmax(dim=-1) for f in (exact, wrong))
    targets = sequences[:, 1:, None]
    nll, wrong_nll = (-one.gather(2, targets)[..., 0] for one in (before, after))
    kl = (before.exp() * (before - after)).sum(dim=-1)
    (result,) = summary["results"]
    assert summary["buckets"] == [[0, 512], [512, 1024], [1024, 1100]]
    for number, (first, end) in enumerate(summary["buckets"]):
        part = slice(first, end)
        native = summary["native"]["nll"][number]
        assert native == pytest.approx(nll[:, part].mean().item(), rel=1e-5)
        if first < 1024:
            assert result["delta_nll"][number] == 0
            assert result["kl"][number] == pytest.approx(0, abs=1e-6)
            continue
        delta = (wrong_nll - nll)[:, part].mean(dim=1)
        assert result["delta_nll"][number] == pytest.approx(delta.mean().item(), rel=1e-3)
        error = pytest.approx(delta.std().item() / 2**0.5, rel=1e-3)
        assert result["delta_nll_stderr"][number] == error
        assert result["kl"][number] == pytest.approx(kl[:, part].mean().item(), rel=1e-3)
    assert (summary["name"], summary["sequences"]) == ("toy.txt", 2)


def test_needles_are_found_as_far_as_a_model_copies():
    """600 tokens, about 100 of them questions: a reach of 330 ends between the depths .3 and .5."""
    measure = needles(3, 600)
    near = toy(copying(reach=330))
    summary = measure.summarize(records(measure, toy(copying(reach=600)), near=near))
    assert summary["needles"] == 15
    assert summary["native"]["retrieved"] == 1
    (result,) = summary["results"]
    assert result["retrieved_by_depth"] == [0, 0, 1, 1, 1]
    assert result["retrieved"] == pytest.approx(0.6)
    assert (result["lost"], result["gained"]) == (6, 0)
    assert result["delta_log_likelihood"] < -1
    back = measure.summarize(records(measure, near, far=toy(copying(reach=600))))
    assert (back["results"][0]["lost"], back["results"][0]["gained"]) == (0, 6)


def test_needles_of_a_text_differ_and_are_the_same_in_every_run():
    seen = []
    measure = needles(2, 600)
    for number in (0, 1, 0):
        measure.run(number, toy(lambda t: seen.append(t) or copying(reach=600)(t)), None)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert seen[0].shape == (1, 600)


def test_generation_until_the_first_difference():
    """Native counts up; the variant is wrong after token 10, so a prompt ending in k has 11 - k."""
    count_up = torch.eye(VOCAB).roll(1, dims=1)
    wrong = count_up.clone()
    wrong[10] = torch.eye(VOCAB)[0]
    prompts = torch.tensor([[7, 3], [7, 10], [7, 30]])
    measure = Generation(prompts, new_tokens=16, **SOURCE)
    collected = records(measure, toy(bigram(count_up)), v=toy(bigram(wrong)))
    assert collected[0]["native"]["tokens"] == list(range(4, 20))
    assert [record["v"]["agree"] for record in collected] == [7, 0, 16]
    (result,) = measure.summarize(collected)["results"]
    assert result["mean_agreement"] == pytest.approx(23 / 3)
    assert result["median_agreement"] == 7
    assert result["full_agreement"] == pytest.approx(1 / 3)


def test_generation_is_greedy_and_a_pass_sees_what_free_decoding_sees():
    prompts = tokens(6, 5)
    native, variant = toy(contextual(seed=3)), toy(contextual(seed=3, noise=0.2))
    collected = records(Generation(prompts, new_tokens=12, **SOURCE), native, v=variant)

    def greedy(model, prompt):
        sequence = prompt.tolist()
        while len(sequence) < 17:
            step = model.logits(torch.tensor([sequence]))[0, -1, :VOCAB]
            sequence.append(step.argmax().item())
        return sequence[5:]

    for prompt, record in zip(prompts, collected, strict=True):
        one, other = greedy(native, prompt), greedy(variant, prompt)
        assert record["native"]["tokens"] == one
        differ = [a != b for a, b in zip(one, other, strict=True)]
        assert record["v"]["agree"] == (differ.index(True) if any(differ) else 12)
    agrees = [record["v"]["agree"] for record in collected]
    assert min(agrees) < max(agrees)  # or the test would show little


def test_generation_follows_the_full_pass_where_shapes_round_differently():
    """A model that answers otherwise in short sequences: the long pass decides."""
    count_up = torch.eye(VOCAB).roll(1, dims=1)

    def logits(sequence):
        shift = 1 if sequence.shape[1] == 9 else 2
        return count_up.roll(shift - 1, dims=1)[sequence]

    model = toy(logits)
    assert generate(torch.tensor([0, 1]), 8, model).tolist() == list(range(2, 10))


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (LongText(tokens(1, 102), **SOURCE), "101 tokens does not fit the model's 100"),
        (needles(1, 600), "600 tokens does not fit"),
        (Generation(tokens(1, 60), new_tokens=42, **SOURCE), "101 tokens does not fit"),
    ],
)
def test_wrong_lengths_are_refused(measure, message):
    with pytest.raises(LowbitError, match=message):
        measure.run(0, toy(contextual(seed=1), max_length=100), None)


def test_a_text_too_short_for_needles_is_refused():
    with pytest.raises(LowbitError, match="60 tokens are too short"):
        needles(1, 60)


def _everything() -> list[dict]:
    items = [Item(["the cat"] * 3, [" sat", " sat down", " ate"], 1)]
    measures = [
        Task(TaskData("toy", "acc", items, "digest")),
        LongText(tokens(1, 600), **SOURCE),
        needles(1, 400),
        Generation(tokens(2, 5), new_tokens=8, **SOURCE),
    ]
    models = [toy(contextual(seed=3)), toy(contextual(seed=3, noise=0.3))]
    return [record for one in measures for record in records(one, models[0], v=models[1])]


@pytest.fixture
def alone() -> list[dict]:
    """What one process finds."""
    return _everything()


@on_each_rank(3)
def test_a_split_vocabulary_gives_the_same_scores(rank, alone):
    found = _everything()
    require_equal("scores", found)
    for one, split in zip(alone, found, strict=True):
        for run in ("native", "v"):
            assert list(one[run]) == list(split[run])
            for name, values in one[run].items():
                assert split[run][name] == pytest.approx(values, rel=1e-4, abs=1e-5), name


def test_names_and_identities_tell_measures_apart():
    one = Generation(tokens(2, 5), new_tokens=8, **SOURCE)
    assert one.identity != Generation(tokens(2, 5), new_tokens=9, **SOURCE).identity
    assert needles(1, 400).identity["depths"] == list(DEPTHS)
    names = {
        one.name,
        needles(1, 400).name,
        LongText(tokens(1, 600), **SOURCE).name,
    }
    assert len(names) == 3
