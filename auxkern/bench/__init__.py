"""Benchmarks: ``python -m auxkern.bench``, ``auxkern.bench.real`` and ``auxkern.bench.report``.

An operator's file (``cross_entropy.py``) holds its inputs, implementations, check and floor;
``cases`` and ``results`` know its name, the rest knows no operator. Nothing else in the package
imports from here.
"""
