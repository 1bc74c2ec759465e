"""For maintainers: the measurements behind the figures, and how fast PPO is."""
