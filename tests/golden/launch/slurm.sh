#!/bin/bash
#SBATCH --job-name=first
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/first/slurm/%j.log
#SBATCH --constraint=h100

# Slurm's warning, 300 seconds before the time limit: the ranks are stopped and the job is put into the queue again. When it
# starts, it goes on from the newest checkpoint of the run folder.
warned=
stop() {
    warned=yes
    echo "tokenyard: the time limit is near: stopping the ranks, then requeueing job $SLURM_JOB_ID"
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap stop USR1

export OMP_NUM_THREADS=4
rendezvous=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 10000))

# One launcher on each host; it starts the ranks there. All hosts run the same command.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 --open-mode=append --output=runs/first/slurm/%j-%N.log \
    python -m tokenyard train \
    parallel.expert=8 \
    batch.sequences=128 \
    run.dir=runs/first \
    seed=2 \
    precision=bf16 \
    launch=torchrun \
    launch.nodes=2 \
    launch.ranks=8 \
    launch.max_restarts=1 \
    launch.rendezvous="$rendezvous" &
step=$!

# A trapped signal ends `wait`, not the ranks.
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done

if [ -n "$warned" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
