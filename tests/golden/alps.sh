#!/bin/bash
#SBATCH --job-name=2026-run-alps-a0000
#SBATCH --account=project1
#SBATCH --partition=normal
#SBATCH --gpus-per-task=1
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=72
#SBATCH --time=02:00:00
#SBATCH --signal=USR2@90
#SBATCH --open-mode=append
#SBATCH --output=/scratch/me/run/allocations/a0000/job/%j_0_log.out
#SBATCH --error=/scratch/me/run/allocations/a0000/job/%j_0_log.err

umask 077
export SLURM_UMASK=0077  # of the ranks and their logs
export FLWR_HPC_T0=$(cut -d" " -f1 /proc/uptime)
export FLWR_HPC_END_S=${SLURM_JOB_END_TIME:-}
export OMP_NUM_THREADS=72
export PYTHONUNBUFFERED=1
export NCCL_NET='AWS Libfabric'
export NCCL_NET_GDR_LEVEL=PHB
export NCCL_CROSS_NIC=1
export NCCL_PROTO='^LL128'
export FI_CXI_DEFAULT_CQ_SIZE=131072
export FI_CXI_DEFAULT_TX_SIZE=16384
export FI_CXI_DISABLE_HOST_REGISTER=1
export FI_CXI_RX_MATCH_MODE=software
export FI_MR_CACHE_MONITOR=userfaultfd
export FLWR_HPC_JOB=2026-run-alps-a0000
export FLWR_HPC_WALLTIME_S=7200
export SUBMITIT_EXECUTOR=slurm

srun --export=ALL --unbuffered --kill-on-bad-exit=1 --cpus-per-task=72 \
  --output=/scratch/me/run/allocations/a0000/job/%j_%t_log.out --error=/scratch/me/run/allocations/a0000/job/%j_%t_log.err \
  /opt/venv/bin/python -u -m submitit.core._submit /scratch/me/run/allocations/a0000/job
