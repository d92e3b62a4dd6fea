"""Operators: one public file each, with its contract, checks, autograd and reduction."""
