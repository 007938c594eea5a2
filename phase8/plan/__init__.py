"""The cost of a config before it runs."""
