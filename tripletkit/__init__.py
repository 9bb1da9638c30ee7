"""Triplet-loss projection heads on precomputed embeddings, from one machine to a Slurm fleet."""

__version__ = "0.1.0"
