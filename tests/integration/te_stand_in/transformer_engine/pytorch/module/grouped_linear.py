import torch

from transformer_engine.pytorch.module.base import TransformerEngineBaseModule


class GroupedLinear(TransformerEngineBaseModule):
    """Routed experts' weights; the tests look for these modules and do not run them."""

    def __init__(self, num_gemms, in_features, out_features, params_dtype=None, **kwargs):
        super().__init__()
        self.num_gemms = num_gemms
        self.parallel_mode = kwargs["parallel_mode"]
        for number in range(num_gemms):
            weight = torch.zeros(out_features, in_features, dtype=params_dtype)
            self.register_parameter(f"weight{number}", torch.nn.Parameter(weight))
