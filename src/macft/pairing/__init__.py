"""Forms a cluster: discovery, a password-authenticated key exchange, link measurement, ring order."""

import logging

# Without a log file, Python would print warnings to the console.
logging.getLogger("macft.pairing").addHandler(logging.NullHandler())
