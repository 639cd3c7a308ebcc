"""Malformed frames for every port that macft opens, and whether the work beside them goes on."""
