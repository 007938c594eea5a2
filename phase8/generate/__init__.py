"""Text generation by recurrent decoding."""
