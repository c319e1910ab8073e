"""Start ranks with torchrun or DeepSpeed, or as a job of Slurm or Kubernetes."""
