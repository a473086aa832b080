#!/bin/bash
#PBS -S /bin/bash
#PBS -N flwr-ntre-a0000
#PBS -v FLWR_HPC_JOB=2026-run-centre-a0000
#PBS -q gpu
#PBS -A p1
#PBS -l select=2:ncpus=32:ngpus=4:mpiprocs=4
#PBS -l place=scatter
#PBS -l filesystems=home:eagle
#PBS -l walltime=26:00:00
#PBS -r y
#PBS -j oe

umask 077
exec >>'/scratch/me/run 1/allocations/a0000/job'/"$PBS_JOBID"_0_log.out 2>>'/scratch/me/run 1/allocations/a0000/job'/"$PBS_JOBID"_0_log.err
export FLWR_HPC_T0=$(cut -d" " -f1 /proc/uptime)
export FLWR_HPC_ATTEMPT=$(date +%s.%N)
cd "$PBS_O_WORKDIR"
# A job's PATH may lack PBS's own programs.
export PATH="$PATH:$(sed -n 's/^PBS_EXEC=//p' "${PBS_CONF_FILE:-/etc/pbs.conf}" 2>/dev/null)/bin"
module load cuda
echo "it's $HOSTNAME"
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=8
export PYTHONUNBUFFERED=1
export GREETING='it'"'"'s $HOME'
export FLWR_HPC_JOB=2026-run-centre-a0000
export FLWR_HPC_WALLTIME_S=93600
export SUBMITIT_LOCAL_JOB_NUM_NODES=2
export SUBMITIT_LOCAL_NTASKS=8
export PYTHONPATH=/opt/flwr-hpc${PYTHONPATH:+:$PYTHONPATH}

mpiexec -n 8 -ppn 4 --cpu-bind depth \
  apptainer exec --nv --bind '/scratch/me/run 1' --bind /opt/flwr-hpc '/scratch/images/torch 2.sif' python3 -u -m flwr_hpc.schedulers.mpi_rank '/scratch/me/run 1/allocations/a0000/job'
