"""C kernels, compiled at first use by `build` and called by ctypes."""
