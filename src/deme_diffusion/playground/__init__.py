"""`deme play`: a local page that merges a run's experts anew in memory, and samples the same seeds from the result."""
