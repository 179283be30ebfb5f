#!/bin/bash
# One stage of training under SLURM, on as many nodes as you ask for; goes on by itself after a time limit.
#
#   sbatch examples/slurm_train.sh avq my_avq.yaml cohort=/path/to/cohort
#   sbatch --nodes=2 examples/slurm_train.sh lm my_lm.yaml
#
# SLURM warns three minutes before the limit; the run saves its state and ends, and the job queues itself again.
#SBATCH --job-name=cortexicon
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -uo pipefail

stage=${1:?usage: sbatch slurm_train.sh STAGE CONFIG [key=value ...]}
config=${2:?usage: sbatch slurm_train.sh STAGE CONFIG [key=value ...]}
shift 2

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Nodes of a cluster often have no way out: everything is read from disk.
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

settings=${ACCELERATE_CONFIG:-training/configs/accelerate/many_gpus.yaml}
gpus=${SLURM_GPUS_ON_NODE:-1}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# One task a node; accelerate starts a process for each of its GPUs. The node's number is known there only.
launch='accelerate launch --config_file "$0" --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" "$@"'

warned=0
step=
trap 'warned=1; kill -TERM "$step"' USR1   # srun passes it on; each process saves and ends

# resume=true starts a new run where there is none.
srun --kill-on-bad-exit=0 bash -c "$launch" "$settings" \
    --num_processes $((SLURM_NNODES * gpus)) --main_process_ip "$head" --main_process_port "$port" \
    -m "cortexicon.training.$stage" "$config" "$@" resume=true &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do  # the signal ended the first wait
    wait "$step"
    code=$?
done

if [ "$warned" = 1 ] && [ "$code" != 0 ]; then
    echo "out of time with the state saved; queueing again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
