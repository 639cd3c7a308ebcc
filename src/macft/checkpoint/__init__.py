"""Snapshots of a run's state, stored atomically and verified when read."""
