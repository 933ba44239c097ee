"""What the stages do, a module each, and the cases that they share with tests/kernels."""
