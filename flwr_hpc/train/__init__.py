"""What runs inside a batch job: the FSDP trainer and its worker."""
