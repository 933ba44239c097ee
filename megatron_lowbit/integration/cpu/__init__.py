"""Megatron on a machine without CUDA."""
