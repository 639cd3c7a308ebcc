"""Which node holds which blocks, so that a step is fastest among what fits: a search over costs, without I/O."""
