"""Loss by position, needles and generation on models whose answers are known."""

import pytest
import torch
from ranks import run_ranks
from toys import VOCAB, bigram, contextual, copying, toy

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.generation import Generation, generate
from megatron_lowbit.evaluation.long_context import LongText, buckets
from megatron_lowbit.evaluation.needles import DEPTHS, Needles
from megatron_lowbit.evaluation.task_data import Item, TaskData
from megatron_lowbit.evaluation.tasks import Task

SOURCE = {"source": "toy.txt", "sha256": "digest"}


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(5))


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
    rows = summary["results"][0]["positions"]
    for native, row in zip(summary["native"]["positions"], rows, strict=True):
        part = slice(row["first"], row["end"])
        assert native["nll"] == pytest.approx(nll[:, part].mean().item(), rel=1e-5)
        if row["first"] < 1024:
            assert row["delta_nll"] == 0
            assert row["kl"] == pytest.approx(0, abs=1e-6)
            continue
        delta = (wrong_nll - nll)[:, part].mean(dim=1)
        assert row["delta_nll"] == pytest.approx(delta.mean().item(), rel=1e-3)
        assert row["delta_nll_stderr"] == pytest.approx(delta.std().item() / 2**0.5, rel=1e-3)
        assert row["kl"] == pytest.approx(kl[:, part].mean().item(), rel=1e-3)
    assert [row["first"] for row in rows] == [0, 512, 1024]
    assert summary["tokens"] == 2200


def test_needles_are_found_as_far_as_a_model_copies():
    """600 tokens, about 100 of them questions: a reach of 330 ends between the depths .3 and .5."""
    measure = Needles(torch.full((3, 600), 80), **SOURCE)
    near = toy(copying(reach=330))
    summary = measure.summarize(records(measure, toy(copying(reach=600)), near=near))
    assert summary["needles"] == 15
    assert summary["native"]["found"] == 1
    (result,) = summary["results"]
    assert result["found_by_depth"] == [0, 0, 1, 1, 1]
    assert result["found"] == pytest.approx(0.6)
    assert (result["lost"], result["gained"]) == (6, 0)
    assert result["delta_log_likelihood"] < -1
    back = measure.summarize(records(measure, near, far=toy(copying(reach=600))))
    assert (back["results"][0]["lost"], back["results"][0]["gained"]) == (0, 6)


def test_needles_of_a_text_differ_and_are_the_same_in_every_run():
    seen = []
    measure = Needles(torch.full((2, 600), 80), **SOURCE)
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
    assert result["agree"] == pytest.approx(23 / 3)
    assert result["agree_median"] == 7
    assert result["all_agree"] == pytest.approx(1 / 3)


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
        (Needles(torch.full((1, 600), 80), **SOURCE), "600 tokens does not fit"),
        (Needles(torch.full((1, 60), 80), **SOURCE), "60 tokens are too short"),
        (Generation(tokens(1, 60), new_tokens=42, **SOURCE), "101 tokens does not fit"),
    ],
)
def test_wrong_lengths_are_refused(measure, message):
    with pytest.raises(LowbitError, match=message):
        measure.run(0, toy(contextual(seed=1), max_length=100), None)


def _everything() -> list[dict]:
    items = [Item(["the cat"] * 3, [" sat", " sat down", " ate"], 1)]
    measures = [
        Task(TaskData("toy", "acc", items, "digest")),
        LongText(tokens(1, 600), **SOURCE),
        Needles(torch.full((1, 400), 80), **SOURCE),
        Generation(tokens(2, 5), new_tokens=8, **SOURCE),
    ]
    models = [toy(contextual(seed=3)), toy(contextual(seed=3, noise=0.3))]
    return [record for one in measures for record in records(one, models[0], v=models[1])]


def _on_rank(rank: int) -> list[dict]:
    return _everything()


def test_a_split_vocabulary_gives_the_same_scores(tmp_path):
    alone = _everything()
    first, *others = run_ranks(3, _on_rank, tmp_path)
    assert all(other == first for other in others)
    for one, split in zip(alone, first, strict=True):
        for run in ("native", "v"):
            assert list(one[run]) == list(split[run])
            for name, values in one[run].items():
                assert split[run][name] == pytest.approx(values, rel=1e-4, abs=1e-5), name


def test_names_and_identities_tell_measures_apart():
    one = Generation(tokens(2, 5), new_tokens=8, **SOURCE)
    assert one.identity != Generation(tokens(2, 5), new_tokens=9, **SOURCE).identity
    assert Needles(tokens(1, 400), **SOURCE).identity["depths"] == list(DEPTHS)
    names = {
        one.name,
        Needles(tokens(1, 400), **SOURCE).name,
        LongText(tokens(1, 600), **SOURCE).name,
    }
    assert len(names) == 3
