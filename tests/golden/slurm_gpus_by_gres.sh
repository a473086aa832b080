#!/bin/bash
#SBATCH --job-name=2026-run-centre-a0000
#SBATCH --account=EUHPC_B01
#SBATCH --partition=boost_usr_prod
#SBATCH --qos=boost_qos_dbg
#SBATCH --constraint=a100
#SBATCH --reservation=flower
#SBATCH --gres=gpu:4
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=1-02:00:00
#SBATCH --signal=USR2@90
#SBATCH --open-mode=append
#SBATCH --output='/scratch/me/run 1/allocations/a0000/job/%j_0_log.out'
#SBATCH --error='/scratch/me/run 1/allocations/a0000/job/%j_0_log.err'
#SBATCH --exclusive
#SBATCH --mem=494000M

umask 077
export SLURM_UMASK=0077  # of the ranks and their logs
export FLWR_HPC_T0=$(cut -d" " -f1 /proc/uptime)
export FLWR_HPC_END_S=${SLURM_JOB_END_TIME:-}
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=8
export PYTHONUNBUFFERED=1
export FLWR_HPC_JOB=2026-run-centre-a0000
export FLWR_HPC_WALLTIME_S=93600
export PYTHONPATH=/opt/flwr-hpc${PYTHONPATH:+:$PYTHONPATH}
export SUBMITIT_EXECUTOR=slurm

srun --export=ALL --unbuffered --kill-on-bad-exit=1 --cpus-per-task=8 \
  --output='/scratch/me/run 1/allocations/a0000/job/%j_%t_log.out' --error='/scratch/me/run 1/allocations/a0000/job/%j_%t_log.err' \
  --cpu-bind=cores \
  /opt/venv/bin/python -u -m submitit.core._submit '/scratch/me/run 1/allocations/a0000/job'
