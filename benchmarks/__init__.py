"""Longer studies and scripts for special machines; no part of the installed package."""
