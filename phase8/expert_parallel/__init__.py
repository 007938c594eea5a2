"""How tokens get to the experts that compute them, and back: in memory and over the ranks that share the experts."""
