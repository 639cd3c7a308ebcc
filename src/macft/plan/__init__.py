"""Who does what: which rows of a step each node computes."""
