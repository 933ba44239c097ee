"""Starting Megatron: arguments, checkpoints, models, engines, the launcher."""
