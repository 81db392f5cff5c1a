#!/bin/bash
# A study on several nodes of a Slurm cluster: Ray's head on the first, its workers on all, the study beside the head.
#
#   sbatch --nodes 4 examples/slurm_ray.sh shakespeare-grid --part shallow_small
#
# The folder that it is submitted from should be one that all nodes mount; where they do not, add
# --checkpoints s3://bucket/folder, or let checkpoints travel. Submitted again, it goes on where it was.

#SBATCH --job-name=nanostudy
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120

set -eu
# source venv/bin/activate      # the same on every node: nanostudy[ray] in one version

# Ray executes what anyone sends who can reach its ports: only this job's processes know this token
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes 1 --ntasks 1 --nodelist "$head" hostname --ip-address | awk '{print $1}'):6379
gpus=${SLURM_GPUS_ON_NODE:-0}

srun --overlap --nodes 1 --ntasks 1 --nodelist "$head" \
    ray start --head --node-ip-address "${address%:*}" --port "${address#*:}" \
    --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "$gpus" --disable-usage-stats --block &
until ray health-check --address "$address" 2> /dev/null; do
    kill -0 $! # where the head ended, so does this
    sleep 2
done

others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
    srun --overlap --nodes "$others" --ntasks "$others" --exclude "$head" \
        ray start --address "$address" --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "$gpus" --block &
    sleep 15 # those that begin later are used as they come
fi

# two minutes before the time is up the study is asked to stop: it saves, and the next submission goes on
nanostudy study run "$@" --executor ray --address "$address" &
study=$!
trap 'kill -TERM "$study"' TERM
wait "$study" || wait "$study"
