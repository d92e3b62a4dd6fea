"""``python3 -m benchmarks.gpu FOLDER``: tests, checks and measures the kernels on an NVIDIA GPU."""
