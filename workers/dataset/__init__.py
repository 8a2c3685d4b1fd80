"""Datasets: what they are made of, how they are built, and the samples that come out."""
