#!/bin/bash
# Slurm: LoRA of FLUX.2 klein base 9B on 2 nodes of 4 GPUs, which is saved before the time limit and resumes by itself.
#   sbatch recipes/launch/slurm.sh
# Hardware: 2 nodes with 4 GPUs of 80 GB each, and a file system that all nodes share. Not run on a cluster; the script
# was run with stand-ins for `srun`, `scancel` and `scontrol`.
# To edit: partition, account, nodes, GPUs, time; VENV, CACHE and OUTPUT. Tokens come from `hf auth login` and
# `wandb login`, whose files are in your home folder, never from this file.
#
# 5 minutes before the time limit Slurm sends SIGUSR1 to this shell, which passes it on to the ranks: they finish the
# step, save, and end with status 75; the job is queued again. It is also queued again after a preemption or if a node fails
# (--requeue). Either way the same command resumes from the newest complete checkpoint. A preemption sends SIGTERM, after
# which torch leaves its ranks 30 seconds; where saving takes longer, ask for `PreemptParameters=send_user_signal`,
# which sends SIGUSR1 at a preemption as well.
#SBATCH --job-name=sciflow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:USR1@300

set -u
VENV=${VENV:-$HOME/venv}
export CACHE=${CACHE:-$PWD/my_cache} OUTPUT=${OUTPUT:-$PWD/outputs/my_lora}
source "$VENV/bin/activate"

export OMP_NUM_THREADS=8
export HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PORT=$((20000 + SLURM_JOB_ID % 10000))  # two jobs on one node do not meet

told=
pass_on() {
    told=yes
    scancel --signal=USR1 "$SLURM_JOB_ID"  # to the processes of the steps, not to this shell
}
trap pass_on USR1

# The launcher ignores SIGUSR1, which would end it; the ranks, which inherit that, set a handler of their own.
# $SLURM_NODEID is another one on each node, so it is read there.
srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec accelerate launch \
    --config_file recipes/launch/four_gpus_bf16.yaml --same_network \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * 4))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$HEAD_NODE" --main_process_port "$PORT" \
    recipes/train_flux2klein.py --config recipes/configs/flux2klein_9b_lora.yaml \
    --dataset_dir "$CACHE" --output_dir "$OUTPUT" --resume_from_checkpoint latest' &
step=$!

wait "$step"
while kill -0 "$step" 2>/dev/null; do  # a signal ends the waiting, not the step
    wait "$step"
done
wait "$step"
status=$?

if [ -n "$told" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
