"""Tokens drawn from written logits through filters: kernels, launches, and what is compiled ahead of time."""
