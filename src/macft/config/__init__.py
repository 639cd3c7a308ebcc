"""Command line and YAML to one typed, checked configuration."""
