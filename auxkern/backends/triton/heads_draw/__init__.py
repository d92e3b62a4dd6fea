"""Tokens drawn from a sum of output heads: the kernel, its launches, and the cases compiled ahead of time."""
