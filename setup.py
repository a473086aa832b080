"""What pyproject.toml cannot say: every folder of code is a package, without a list of them."""

from setuptools import find_packages, setup

DATA = ["flwr_hpc.conf", "flwr_hpc.slurm_templates"]  # lie at the top, see package-dir
setup(packages=[*find_packages(include=["flwr_hpc*", "strategies*"]), *DATA])
