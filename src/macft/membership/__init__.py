"""Elastic runs: heartbeats, agreement on the members, and a ring that is formed again when they change."""

import logging

# Without a log file, Python would print warnings to the console.
logging.getLogger("macft.membership").addHandler(logging.NullHandler())
