"""Arithmetic only: each module holds one BACKEND that follows ``auxkern.ops.registry.Backend``."""
