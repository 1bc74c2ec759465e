"""Lessons 4 to 9, and beside each what it and nobody else needs."""
