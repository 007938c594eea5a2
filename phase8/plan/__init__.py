"""What a config will cost before it runs."""
