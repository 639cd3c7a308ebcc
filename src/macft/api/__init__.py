"""macft from Python: configurations, runs and models, as ``import macft`` offers them."""
