"""Starts the ranks of a run: as local processes, on listed hosts, over SSH."""
