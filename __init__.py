"""tokenyard: Mixture-of-Experts pretraining with expert, data and tensor parallelism."""

__version__ = "0.1.0"
