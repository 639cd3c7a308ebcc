"""Each rank's log file: standard ``logging``, with rank, generation and step on every line."""
