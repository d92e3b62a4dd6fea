"""What everyone in the package speaks: terms, the loss, draws, what a backend is."""
