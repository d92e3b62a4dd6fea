"""Cross-entropy of a sum of output heads: kernels, their launches, and the cases compiled ahead of time."""
