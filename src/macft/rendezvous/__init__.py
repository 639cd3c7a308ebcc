"""How the ranks of a run find each other and check that they belong together."""
