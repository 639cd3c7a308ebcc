"""Finding, starting and joining the nodes of a run."""
