"""``macft data``: what is trained on, row by row, and how long the rows are."""
