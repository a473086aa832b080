#!/bin/bash
#SBATCH --job-name=2026-run-lumi-a0000
#SBATCH --account=project1
#SBATCH --partition=standard-g
#SBATCH --gpus-per-node=8
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=7
#SBATCH --time=02:00:00
#SBATCH --signal=USR2@90
#SBATCH --open-mode=append
#SBATCH --output=/scratch/me/run/allocations/a0000/job/%j_0_log.out
#SBATCH --error=/scratch/me/run/allocations/a0000/job/%j_0_log.err

umask 077
export SLURM_UMASK=0077  # of the ranks and their logs
export FLWR_HPC_T0=$(cut -d" " -f1 /proc/uptime)
export FLWR_HPC_END_S=${SLURM_JOB_END_TIME:-}
export MIOPEN_USER_DB_PATH=/tmp/miopen-$SLURM_JOB_ID
export MIOPEN_CUSTOM_CACHE_DIR=$MIOPEN_USER_DB_PATH
export OMP_NUM_THREADS=7
export PYTHONUNBUFFERED=1
export NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3
export NCCL_NET_GDR_LEVEL=3
export CXI_FORK_SAFE=1
export CXI_FORK_SAFE_HP=1
export FI_CXI_DISABLE_CQ_HUGETLB=1
export FLWR_HPC_JOB=2026-run-lumi-a0000
export FLWR_HPC_WALLTIME_S=7200
export SUBMITIT_EXECUTOR=slurm

srun --export=ALL --unbuffered --kill-on-bad-exit=1 --cpus-per-task=7 \
  --output=/scratch/me/run/allocations/a0000/job/%j_%t_log.out --error=/scratch/me/run/allocations/a0000/job/%j_%t_log.err \
  --cpu-bind=mask_cpu:fe000000000000,fe00000000000000,fe0000,fe000000,fe,fe00,fe00000000,fe0000000000 \
  /opt/venv/bin/python -u -m submitit.core._submit /scratch/me/run/allocations/a0000/job
