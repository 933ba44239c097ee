"""Hugging Face and GGUF models to Megatron checkpoints."""
