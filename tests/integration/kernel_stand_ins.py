"""What Mamba and gated delta nets need from packages of CUDA kernels, in plain torch.

mamba-ssm and flash-linear-attention cannot be installed on a machine without CUDA. These stand-ins
compute the same functions, so that Megatron's own mixers run here; no speed is claimed of them.
"""

import importlib
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """`mamba_ssm.ops.triton.layernorm_gated.RMSNorm` with the gate before the norm."""

    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True, **kwargs):
        super().__init__()
        assert not norm_before_gate
        self.eps, self.group_size = eps, group_size or hidden_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, **kwargs))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        gated = x.float() * F.silu(z.float())
        groups = gated.unflatten(-1, (-1, self.group_size))
        normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (normed.flatten(-2) * self.weight.float()).to(x.dtype)


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, *, D, dt_bias, dt_softplus, **kwargs):
    """The selective scan, a token at a time: ``h = exp(dt A) h + dt B x; y = C h + D x``.

    x ``[b, l, heads, p]``, dt ``[b, l, heads]``, A and D ``[heads]``, B and C
    ``[b, l, groups, n]``.
    """
    assert dt_softplus
    assert not any(kwargs.values()), kwargs
    dt = F.softplus(dt.float() + dt_bias)
    repeat = x.shape[2] // B.shape[2]
    B, C = (t.float().repeat_interleave(repeat, dim=2) for t in (B, C))
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1], dtype=torch.float32)
    steps = []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * A).exp()[..., None, None]
        update = (dt[:, t, :, None] * x[:, t].float())[..., None] * B[:, t, :, None]
        state = decay * state + update
        steps.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(steps, dim=1) + x.float() * D.float()[:, None]
    return y.to(x.dtype)


def l2norm(x: Tensor, dim: int = -1, eps: float = 1e-6) -> Tensor:
    """`fla.modules.l2norm.l2norm`."""
    return x * torch.rsqrt(x.float().square().sum(dim, keepdim=True) + eps).to(x.dtype)


def _unused(*args, **kwargs):
    raise AssertionError("a kernel that these tests do not use")


def install() -> None:
    """Make `import mamba_ssm` and `import fla` take these, also where Megatron has looked for them.

    A mixer that was made before stays without them.
    """
    functions = {
        "mamba_ssm": {"__version__": "2.2.6"},
        "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": RMSNorm},
        "mamba_ssm.ops.triton.ssd_combined": {
            "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
            "mamba_split_conv1d_scan_combined": _unused,
        },
        "fla.modules.convolution": {"causal_conv1d": _unused},
        "fla.modules.l2norm": {"l2norm": l2norm},
        "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": _unused},
    }
    for path, names in functions.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
        vars(sys.modules[path]).update(names)
    for name in ("mamba_mixer", "gated_delta_net.common"):
        importlib.reload(importlib.import_module(f"megatron.core.ssm.{name}"))
