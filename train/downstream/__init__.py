"""What a model can do: questions whose answers are scored, tasks of lm-eval, and text that it writes, on the ranks that train."""
