"""Where `launch/`, `tools/` and `configs/` of the repository lie in an installed package: setup.py maps them here, and nothing imports them."""
