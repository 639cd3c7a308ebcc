"""Heat and power: what a node reads, may use, and does about it."""
