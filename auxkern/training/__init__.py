"""Training an auxiliary: data, cached states of the frozen LM, the loop."""
