"""Does a Mixture of Experts pay? Dense models and MoE variants of equal active size, trained on the same tokens."""
