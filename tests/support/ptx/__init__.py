"""Executes the PTX that Triton makes of a kernel, every thread of its grid, and watches its memory.

A ``Launch`` and CPU tensors go in (``run``); results land in the tensors, and what a GPU would not have
forgiven in a ``Report``: an access outside a tensor or not aligned, memory that nobody wrote, a race, a
wait or a fence that is missing. Instructions mean what the PTX ISA says, to the last bit.
"""
