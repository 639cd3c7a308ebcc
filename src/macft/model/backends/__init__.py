"""Kernel backends."""
