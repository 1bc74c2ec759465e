"""The part of the series that two notebooks share or a test must check."""
