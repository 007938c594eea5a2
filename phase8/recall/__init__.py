"""Recall: synthetic sequences in which tokens shown earlier are asked for, and how many of them a trained model recalls."""
