"""Experiment trackers beside TensorBoard: Weights & Biases, SwanLab, trackio, MLflow, each through its own library."""
