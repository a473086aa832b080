"""What learning algorithms do in an order of the trainer, a file each."""
