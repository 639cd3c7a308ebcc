"""Who does what, and what a run needs: rows of a step by node, memory, fit and speed before anything loads."""
