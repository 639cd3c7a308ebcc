"""``macft plan``: memory, speed and time of a whole run, and what would help."""
