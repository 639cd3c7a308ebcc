"""Elastic runs: heartbeats, agreement on the members, and a ring that is rebuilt when they change."""
