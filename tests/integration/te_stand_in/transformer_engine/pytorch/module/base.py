import torch


class TransformerEngineBaseModule(torch.nn.Module):
    """With the `_extra_state` that TE adds to every state_dict."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state) -> None:
        """Nothing to set without FP8."""
