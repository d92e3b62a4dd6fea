"""Tokens drawn from a sum of logits: kernels, their launches, and the cases compiled ahead of time."""
