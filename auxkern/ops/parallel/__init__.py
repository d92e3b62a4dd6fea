"""Operators over a vocabulary that is cut over the ranks of a process group."""
