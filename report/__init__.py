"""A page about a run, made of its journals: `tokenyard report` writes it, `tokenyard watch` serves it. No torch."""
