"""How the model spreads over ranks. `parallel.apply.parallelize` is the one place where a model is changed for it."""
