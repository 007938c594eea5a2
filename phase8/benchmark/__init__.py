"""Training speed: of one config, of techniques and lengths side by side, of layouts of several ranks."""
