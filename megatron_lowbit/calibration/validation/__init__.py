"""What an index, a recipe and a saved state may hold."""
