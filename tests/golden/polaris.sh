#!/bin/bash
#PBS -S /bin/bash
#PBS -N flwr-aris-a0000
#PBS -v FLWR_HPC_JOB=2026-run-polaris-a0000
#PBS -q capacity
#PBS -A project1
#PBS -l select=1:system=polaris
#PBS -l place=scatter
#PBS -l filesystems=home:eagle
#PBS -l walltime=02:00:00
#PBS -r y
#PBS -j oe

umask 077
exec >>/scratch/me/run/allocations/a0000/job/"$PBS_JOBID"_0_log.out 2>>/scratch/me/run/allocations/a0000/job/"$PBS_JOBID"_0_log.err
export FLWR_HPC_T0=$(cut -d" " -f1 /proc/uptime)
export FLWR_HPC_ATTEMPT=$(date +%s.%N)
cd "$PBS_O_WORKDIR"
# A job's PATH may lack PBS's own programs.
export PATH="$PATH:$(sed -n 's/^PBS_EXEC=//p' "${PBS_CONF_FILE:-/etc/pbs.conf}" 2>/dev/null)/bin"
export OMP_NUM_THREADS=8
export PYTHONUNBUFFERED=1
export http_proxy=http://proxy.alcf.anl.gov:3128
export https_proxy=http://proxy.alcf.anl.gov:3128
export FLWR_HPC_JOB=2026-run-polaris-a0000
export FLWR_HPC_WALLTIME_S=7200
export SUBMITIT_LOCAL_JOB_NUM_NODES=1
export SUBMITIT_LOCAL_NTASKS=4

mpiexec -n 4 -ppn 4 --cpu-bind depth -d 16 \
  /opt/venv/bin/python -u -m flwr_hpc.schedulers.mpi_rank /scratch/me/run/allocations/a0000/job
