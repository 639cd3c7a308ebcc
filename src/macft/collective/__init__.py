"""Operations that all ranks of a run carry out together: summing, sharing and gathering."""

import logging

# Without a log file, Python would print warnings to the console.
logging.getLogger("macft.ring").addHandler(logging.NullHandler())
