"""Datasets that come with macft."""
