"""How the ranks of a run find each other and check that they belong together."""

import logging

# Without a log file, Python would print warnings to the console.
logging.getLogger("macft.rendezvous").addHandler(logging.NullHandler())
