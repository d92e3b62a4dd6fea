"""What ``auxkern train``, ``generate`` and ``evaluate`` do."""
