"""What tools/calibrate.py and tools/evaluate.py do with a Megatron checkpoint."""
