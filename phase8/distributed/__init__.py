"""Processes that work together: how they find each other, and what happens when one of them fails."""
