"""How good a pair is: what it gives to held-out text, and what its samples are like."""
