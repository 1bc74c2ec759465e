"""For maintainers: names in links, pictures, expected figures."""
