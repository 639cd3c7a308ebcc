"""Gradient codecs: fewer bytes on the wire, behind one interface."""
