"""What goes wrong in a running training: steps that must not count, copies that differ, ranks that are slow."""
