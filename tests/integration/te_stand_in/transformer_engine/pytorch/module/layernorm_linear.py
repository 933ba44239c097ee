import torch
import torch.nn.functional as F

from transformer_engine.pytorch.module.linear import Linear


class LayerNormLinear(Linear):
    """A norm (RMSNorm only here) and a column-parallel linear."""

    def __init__(
        self,
        in_features,
        out_features,
        eps=1e-5,
        normalization="RMSNorm",
        zero_centered_gamma=False,
        return_layernorm_output=False,
        **kwargs,
    ):
        assert normalization == "RMSNorm"
        assert not zero_centered_gamma
        super().__init__(in_features, out_features, **kwargs)
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(in_features, dtype=self.weight.dtype)
        )

    def forward(self, inp, is_first_microbatch=None):
        rows = F.rms_norm(inp, (inp.shape[-1],), self.layer_norm_weight, self.eps)
        return super().forward(rows, is_first_microbatch)
