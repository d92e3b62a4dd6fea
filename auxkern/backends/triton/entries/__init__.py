"""Entries of sparse terms beside heads: their order for the tiles, their gradients, their own statistics."""
