"""SSH connections to hosts, file transfer, and the probe that runs there."""
