"""Where Megatron sums partials, and how we step in."""
