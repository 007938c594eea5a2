"""The configurable surface: schema, loading, cross-section rules."""
