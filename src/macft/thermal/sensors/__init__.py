"""The sensors, one module for each source of readings."""
