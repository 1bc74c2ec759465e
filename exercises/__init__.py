"""Exercises for nbgrader: sources, student versions, and what puts them in order."""
