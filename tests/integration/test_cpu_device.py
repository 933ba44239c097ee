"""The device that a machine without CUDA names: scripts put it into strings, too."""

import torch

from megatron_lowbit.integration.cpu.device import CudaAsCpu

CPU = torch.device("cpu")  # what torch.cuda.current_device() gives there


def test_the_current_device_by_its_name_is_the_cpu():
    with CudaAsCpu():
        assert torch.device(f"cuda:{CPU}") == CPU
        assert torch.ones(1, device=f"cuda:{CPU}").to(f"cuda:{CPU}").device == CPU
        assert torch.ones(1, device=torch.device(f"cuda:{CPU}")).device == CPU


def test_other_devices_stay_what_they_are():
    with CudaAsCpu():
        assert str(torch.device("cuda:1")) == str(torch.device("cuda", 1)) == "cuda:1"
        assert torch.device(CPU) == torch.device("cpu") == torch.device(type="cpu") == CPU
