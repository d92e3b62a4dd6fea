"""Arithmetic only: each module holds one BACKEND that is an ``auxkern.core.backend.Backend``."""
