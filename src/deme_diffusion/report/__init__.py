"""Tables, verdict, figures, page and model card of a run; nothing here imports torch."""
