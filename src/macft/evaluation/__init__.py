"""Generation, metrics, and the comparison of two models."""
