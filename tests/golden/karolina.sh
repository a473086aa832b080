#!/bin/bash
#SBATCH --job-name=2026-run-karolina-a0000
#SBATCH --account=project1
#SBATCH --partition=qgpu
#SBATCH --gpus-per-node=8
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --time=02:00:00
#SBATCH --signal=USR2@90
#SBATCH --open-mode=append
#SBATCH --output=/scratch/me/run/allocations/a0000/job/%j_0_log.out
#SBATCH --error=/scratch/me/run/allocations/a0000/job/%j_0_log.err

umask 077
export SLURM_UMASK=0077  # of the ranks and their logs
export FLWR_HPC_T0=$(cut -d" " -f1 /proc/uptime)
export FLWR_HPC_END_S=${SLURM_JOB_END_TIME:-}
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=16
export PYTHONUNBUFFERED=1
export FLWR_HPC_JOB=2026-run-karolina-a0000
export FLWR_HPC_WALLTIME_S=7200
export SUBMITIT_EXECUTOR=slurm

srun --export=ALL --unbuffered --kill-on-bad-exit=1 --cpus-per-task=16 \
  --output=/scratch/me/run/allocations/a0000/job/%j_%t_log.out --error=/scratch/me/run/allocations/a0000/job/%j_%t_log.err \
  /opt/venv/bin/python -u -m submitit.core._submit /scratch/me/run/allocations/a0000/job
