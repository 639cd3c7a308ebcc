"""How good the answers are: generation and metrics."""
