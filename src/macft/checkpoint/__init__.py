"""Atomic saving and exact resuming."""
