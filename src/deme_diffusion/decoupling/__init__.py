"""Decouple: experts finetuned on subsets of the timesteps, and the same loop for bases and controls."""
