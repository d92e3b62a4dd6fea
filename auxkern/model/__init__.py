"""The pair: a frozen language model and its auxiliary."""
