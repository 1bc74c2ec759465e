"""What learners try things out with: checks, an exact world, a tiny world."""
