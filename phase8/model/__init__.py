"""The Phase 8 model and its transformer baseline."""
