"""Running statistics of the partials: what calibration keeps, in memory that does not grow.

Each sequence is first summarized per sync point and feature (`summarize`), then folded into the
running state in the corpus's order (`RunningStatistics.fold`): minimum and maximum by the paper's
moving average, m <- (1-g) m + g m_seq with g = 0.01 and the first sequence as it is; sum and sum of
squares by addition in fp64. Data-parallel ranks exchange summaries, not states, and all fold all of
them in the corpus's order: the result has the same bits for any number of data-parallel ranks.
"""

import torch
from torch import Tensor

MOMENTUM = 0.01
STATISTICS = ("minimum", "maximum", "mean", "second_moment")  # what is kept, in this order
_SUM = STATISTICS.index("mean")  # from here on sums, which `result` divides


def summarize(partial: Tensor) -> Tensor:
    """Summary of one sequence at one sync point.

    Args:
        partial: ``[..., hidden]``, all tokens of one sequence.

    Returns:
        fp32 ``[statistics, hidden]``: minimum, maximum, sum, sum of squares of each feature.
    """
    tokens = partial.detach().reshape(-1, partial.shape[-1]).float()
    low, high = tokens.aminmax(dim=0)
    return torch.stack([low, high, tokens.sum(dim=0), tokens.square().sum(dim=0)])


class RunningStatistics:
    """The state of one rank for all its sync points.

    Attributes:
        state: fp64 ``[points, statistics, hidden]``: moving minimum and maximum, sum, sum of
            squares.
        sequences: Sequences folded in.
        tokens: Tokens folded in.
    """

    def __init__(self, points: int, hidden: int):
        self.state = torch.zeros(points, len(STATISTICS), hidden, dtype=torch.float64)
        self.sequences = 0
        self.tokens = 0

    def fold(self, summaries: Tensor, tokens: int) -> None:
        """Add one sequence.

        Args:
            summaries: fp32 ``[points, statistics, hidden]``, a `summarize` of each sync point.
            tokens: Tokens in the sequence.
        """
        new = summaries.to(self.state)
        if self.sequences == 0:
            self.state[:, :_SUM] = new[:, :_SUM]
        else:
            self.state[:, :_SUM] += MOMENTUM * (new[:, :_SUM] - self.state[:, :_SUM])
        self.state[:, _SUM:] += new[:, _SUM:]
        self.sequences += 1
        self.tokens += tokens

    def result(self) -> Tensor:
        """fp32 ``[points, statistics, hidden]``, as `STATISTICS` names them."""
        result = self.state.clone()
        result[:, _SUM:] /= self.tokens
        return result.float()
