"""One rank's run: preparation, training, results."""
