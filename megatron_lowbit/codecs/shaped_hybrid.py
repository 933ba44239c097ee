"""``shaped-hybrid``: `rotated-hybrid` on partials that calibration has centred and evened out.

Before the rotation each rank subtracts its partial's calibrated mean, and every feature is
multiplied by variance^(-1/4), the same on all ranks; after the sum is turned back it is divided by
that, and the means of all ranks are added. Neither costs a bit on the wire, and the rows, payloads
and kernels are those of `codecs.rotated_hybrid`.

Why the mean: it is common to all tokens, so its energy need not be sent again and again; the
attention projections of SmolLM2-135M have 0.4 to 5 dB of it. Why that power: with weights w the
rotated row has the energy sum(w^2 v), the quantization's noise is spread evenly over it, and
turning back divides feature i's share by w_i^2; the sum of sum(w^2 v) / w_i^2 over features is
least at w_i = v_i^(-1/4). It is sum(sqrt(v))^2 then, against hidden * sum(v) unweighted: what
outliers cost no longer grows with their square.

The weights are good for every TP degree. The means belong to the calibrated one and to those that
divide it; elsewhere nothing is subtracted.
"""

from dataclasses import replace

from megatron_lowbit.codecs import variance
from megatron_lowbit.codecs.rotated_hybrid import RotatedHybrid
from megatron_lowbit.codecs.tables import Tables, other_features, sum_in_rank_order

_POWER = 0.25


class ShapedHybrid(RotatedHybrid):
    """As many bits as `rotated-hybrid`."""

    name = "shaped-hybrid"

    def tables(self, hidden, *, bf16_index=None, statistics=None, device=None) -> Tables:
        known, mean = variance.calibrated(statistics, hidden, self.name), statistics.mean
        device = device or known.device
        tables = super().tables(hidden, bf16_index=bf16_index, device=device)
        body = other_features(tables.bf16_index, hidden).to(known.device)
        share = variance.relative(known.sum(dim=0), body, _POWER)
        weights = (share**-_POWER).to(device)
        tables = replace(
            tables,
            encode_scale=tables.encode_scale * weights,
            decode_scale=tables.decode_scale / weights,
        )
        if mean is None:
            return tables
        center = mean.float().to(device, copy=True)
        center[:, tables.bf16_index] = 0  # these are sent as they are
        return replace(tables, center=center, center_sum=sum_in_rank_order(center))
