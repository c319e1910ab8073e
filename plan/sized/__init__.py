"""The memory of a step in closed form: the model on tensors that are sizes alone."""
