"""``python -m auxkern.inspect``: what the compiler made of every Triton kernel; needs no GPU."""
