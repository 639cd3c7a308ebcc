"""A model cut into its blocks, whose weights may be in memory only while a block is computed."""
