"""Which rank computes which rows: shares, their balance, and each node's status."""
