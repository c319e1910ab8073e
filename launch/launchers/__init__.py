"""How ranks are started: here, by torchrun, by DeepSpeed, or as a job of Slurm or Kubernetes."""
