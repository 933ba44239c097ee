class QuantizedTensor:
    """What megatron.core compares weights with; nothing here is quantized."""
