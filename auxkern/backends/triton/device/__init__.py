"""Functions that several kernels call."""
