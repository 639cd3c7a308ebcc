"""A run as those see it who watch it: its facts, read from its folder, at a terminal or on a page."""
