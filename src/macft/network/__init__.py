"""Network links of this machine, and the measurement of a link between two machines."""
