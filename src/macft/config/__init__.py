"""From the command line to one typed, checked configuration."""
