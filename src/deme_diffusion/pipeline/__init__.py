"""The stage graph of a recipe: what it consists of, how it is run, and the run folder it leaves."""
