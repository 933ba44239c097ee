import torch


class RMSNorm(torch.nn.RMSNorm):
    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        hidden_size=None,  # the older name of normalized_shape
        zero_centered_gamma=False,
        device="cpu",
    ):
        assert not zero_centered_gamma
        shape = hidden_size if normalized_shape is None else normalized_shape
        super().__init__(shape, eps=eps, dtype=params_dtype, device=device)
