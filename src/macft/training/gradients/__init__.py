"""A step's gradient: what a node computes, whole, block by block or as a stage, and its mean over all nodes."""
