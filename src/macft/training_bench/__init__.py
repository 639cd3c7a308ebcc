"""Measures training on this machine beside mlx-lm's trainer: random weights, a process for each run, by turns."""
