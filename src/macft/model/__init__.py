"""Models: the one a run names, found or fetched, loaded for the device at hand, and its adapters."""
