"""Benchmarks: ``python -m auxkern.bench``, ``auxkern.bench.real`` and ``auxkern.bench.report``.

An ``Operator`` (``losses.py``, ``sample.py``) is its inputs, implementations, check and floor; the runner
measures any of them, and ``generate.py`` whole texts. All leave a record (``results.py``), from which tables
and pictures are drawn. Nothing else in the package imports from here.
"""
