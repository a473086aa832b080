"""Stands in for torchvision where no build of it fits torch: transforms of Flower's examples."""
