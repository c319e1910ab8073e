"""Overrides of a run of seconds on synthetic text. Import it as `tiny_run`: tests/conftest.py puts this folder on the path."""

TINY_RUN = [
    "sequence_length=32",
    "batch.sequences=8",
    "model.layers=2",
    "model.width=32",
    "model.heads=4",
    "model.moe.hidden=32",
    "model.vocabulary=264",
    "schedule.warmup=2",
    "data=synthetic",
    "data.synthetic_documents=64",
    "tokenizer=bytes",
    "tracker=jsonl",
]
