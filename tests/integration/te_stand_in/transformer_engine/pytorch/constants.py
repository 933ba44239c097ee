import torch

TE_DType = {torch.bfloat16: 0, torch.float32: 1}
