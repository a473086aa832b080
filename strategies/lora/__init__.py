"""Strategies for LoRA adapters alone, a file each."""
