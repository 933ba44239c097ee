"""The only place that imports Megatron. What each folder is for: README.md beside this file."""
