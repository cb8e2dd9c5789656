"""Merge: task vectors, methods, streamed application, and the search for weights."""
