"""Drawings of the paper's figures, a module for each kind of `figure_file` data: arrays in, pictures out. No torch."""
