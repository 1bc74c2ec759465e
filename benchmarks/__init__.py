"""What the loops of the notebooks cost, beside others on the same work."""
