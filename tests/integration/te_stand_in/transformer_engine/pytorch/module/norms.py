import torch


class _Norm:
    def __init__(
        self,
        normalized_shape,
        eps,
        sequence_parallel,
        params_dtype,
        zero_centered_gamma=False,
        device="cpu",
    ):
        assert not zero_centered_gamma
        super().__init__(normalized_shape, eps=eps, dtype=params_dtype, device=device)


class RMSNorm(_Norm, torch.nn.RMSNorm):
    pass


class LayerNorm(_Norm, torch.nn.LayerNorm):
    pass
