"""Conditional-generation tasks and their data."""
