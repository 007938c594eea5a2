"""Processes that work together: how they find each other, and how they end when one of them fails."""
