"""All-reduce, broadcast and the like between ranks, behind one interface."""
