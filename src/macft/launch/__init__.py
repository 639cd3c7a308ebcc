"""Starts the ranks of a run: as local processes, on listed hosts, over SSH."""

import logging

# Without a log file, Python would print warnings to the console.
logging.getLogger("macft.launch").addHandler(logging.NullHandler())
