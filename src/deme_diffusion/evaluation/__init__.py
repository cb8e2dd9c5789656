"""Evaluation: sampling, features, metrics, cost, and the objectives that a search may ask."""
