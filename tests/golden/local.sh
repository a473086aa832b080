#!/bin/bash

umask 077
ulimit -c 0
export SUBMITIT_EXECUTOR=local
export SUBMITIT_LOCAL_COMMAND='/opt/venv/bin/python -u -m submitit.core._submit '"'"'/scratch/me/run 1/allocations/a0000/job'"'"''
export SUBMITIT_LOCAL_JOB_NUM_NODES=1
export SUBMITIT_LOCAL_NODEID=0
export SUBMITIT_LOCAL_NTASKS=2
export SUBMITIT_LOCAL_SIGNAL_DELAY_S=10
export SUBMITIT_LOCAL_TIMEOUT_S=3600
export SUBMITIT_LOCAL_WITH_SHELL=''
export SUBMITIT_STDERR_TO_STDOUT=''
export CUDA_VISIBLE_DEVICES=''
export OMP_NUM_THREADS=1
export PYTHONUNBUFFERED=1
export FLWR_HPC_JOB=2026-run-centre-a0000
export FLWR_HPC_WALLTIME_S=3600
export FLWR_HPC_JOB_DIR='/scratch/me/run 1/allocations/a0000/job'
export PYTHONPATH=/opt/flwr-hpc${PYTHONPATH:+:$PYTHONPATH}

exec /opt/venv/bin/python -m flwr_hpc.schedulers.local.controller '/scratch/me/run 1/allocations/a0000/job'
