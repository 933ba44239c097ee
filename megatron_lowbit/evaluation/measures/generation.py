"""How long greedy generation stays what native communication generates.

Native's continuation c of a prompt is generated once. A variant then needs one pass over prompt and
c: as long as its most likely next tokens are those of c it has seen the very prefix that its own
generation would have seen, so the first position that differs is the first difference of its free
generation too.

The continuation is found without a cache: first token by token over a growing sequence, then by
passes over the whole of it. Such a pass either confirms the guess, each token being the most likely
one given those before it, or gives a better one, in which one token more is settled at least.

The confirming pass makes the comparison fair. Kernels round differently for other shapes, so that
at near ties the growing sequence can give another continuation than one pass over all of it, and
native itself would seem to differ. What counts is the pass: every run that is compared, native or
not, has the same shape, and native agrees with its own continuation by construction.
"""

import statistics

import torch
from torch import Tensor

from megatron_lowbit.evaluation.measures.long_context import log_probs, require_positions
from megatron_lowbit.evaluation.measures.measure import NATIVE, Record, Scores
from megatron_lowbit.evaluation.measures.uncertainty import mean, stderr
from megatron_lowbit.model import logits as lm
from megatron_lowbit.model.language_model import LanguageModel


class Generation:
    """A `Measure` of greedy generation; its score is how many tokens agree with native.

    A unit is one prompt. A token that ends a text is a token like others: what follows it counts.

    Args:
        prompts: int64 ``[n, prompt_length]``.
        new_tokens: How many to generate.
        source: What the prompts are from, for the name.
        sha256: Of that.
    """

    unit = "prompt"

    def __init__(self, prompts: Tensor, *, new_tokens: int, source: str, sha256: str) -> None:
        count, length = prompts.shape
        self.name = f"generation from {source}"
        self._source = source
        self.identity = {
            "sha256": sha256,
            "prompts": count,
            "prompt_length": length,
            "new_tokens": new_tokens,
        }
        self._prompts = prompts
        self._new_tokens = new_tokens

    def __len__(self) -> int:
        return len(self._prompts)

    def run(
        self, number: int, model: LanguageModel, native: Tensor | None
    ) -> tuple[Scores, Tensor | None]:
        """Continue prompt `number`, or compare with `native`, native's continuation.

        Raises:
            LowbitError: Prompt and continuation are longer than the model's positions.
        """
        prompt = self._prompts[number]
        require_positions(len(prompt) + self._new_tokens - 1, model)
        if native is None:
            continuation = generate(prompt, self._new_tokens, model)
            return {"tokens": continuation.tolist()}, continuation
        agrees = next_tokens(prompt, native, model) == native
        return {"agree": int(agrees.cumprod(dim=0).sum())}, None

    def summarize(self, records: list[Record]) -> dict:
        """Tokens until the first difference, at most `new_tokens`, and the share of full agreement.

        ``mean_agreement`` has its standard error over prompts; ``full_agreement`` is the share of
        prompts without a difference.
        """
        return {
            "name": self._source,
            **self.identity,
            "results": [
                self._result(variant, [record[variant]["agree"] for record in records])
                for variant in records[0]
                if variant != NATIVE
            ],
        }

    def _result(self, variant: str, agree: list[int]) -> dict:
        full = [int(count == self._new_tokens) for count in agree]
        return {
            "variant": variant,
            "mean_agreement": mean(agree),
            "mean_agreement_stderr": stderr(agree),
            "median_agreement": statistics.median(agree),
            "full_agreement": mean(full),
            "full_agreement_stderr": stderr(full),
        }


def generate(prompt: Tensor, new_tokens: int, model: LanguageModel) -> Tensor:
    """Greedy continuation of int64 `prompt` ``[length]``: int64 ``[new_tokens]`` on the CPU."""
    guess = torch.zeros(new_tokens, dtype=torch.int64)
    for known in range(new_tokens):
        guess[known] = next_tokens(prompt, guess[: known + 1], model)[known]
    for _ in range(new_tokens):  # at the latest then all are settled
        better = next_tokens(prompt, guess, model)
        if torch.equal(better, guess):
            break
        guess = better
    return guess


def next_tokens(prompt: Tensor, continuation: Tensor, model: LanguageModel) -> Tensor:
    """The most likely token at each place of `continuation`, given `prompt` and what precedes."""
    sequence = torch.cat([prompt.cpu(), continuation[:-1]])
    logits = model.logits(sequence[None])[0, len(prompt) - 1 :]
    best = lm.top1(log_probs(logits, model), group=model.tp_group).cpu()
    return model.stages.shared(best, source=0)  # how often all run the model hangs on it
