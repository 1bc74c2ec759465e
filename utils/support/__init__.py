"""The machinery behind the series, which a learner need not read."""
