"""What is particular to averages of LoRA adapters."""
