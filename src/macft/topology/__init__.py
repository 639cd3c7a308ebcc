"""Which machines form a run: the Hydra group ``topology``, and cluster files."""
