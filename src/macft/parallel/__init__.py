"""Which rank computes which rows and blocks: shares, their balance, stages, and each node's status."""
