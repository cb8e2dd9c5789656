"""The next ablation plan: ranked offline by what was measured, or asked of a language model. No torch."""
