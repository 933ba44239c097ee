import torch
import torch.nn.functional as F


def rmsnorm_fwd(x, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    """What Megatron's inference-optimized layers call: the normalized rows first."""
    assert ln_out is None
    assert not zero_centered_gamma
    return F.rms_norm(x, (x.shape[-1],), weight, eps), None, torch.empty(0)
