"""Starts the ranks of a cluster that generates answers, for the commands that answer."""
