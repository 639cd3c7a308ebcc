"""Which machines take part in a run: the Hydra group ``topology`` and clusters as files."""
