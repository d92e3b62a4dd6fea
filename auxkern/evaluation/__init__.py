"""How good a pair is."""
