"""What learning algorithms need of the trainer, a file each."""
