"""A run's events, and the sinks that show them: console, TensorBoard, metrics file, summary, log."""
