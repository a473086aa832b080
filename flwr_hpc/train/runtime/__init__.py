"""What makes steps fast and changes none of their numbers: device, compiler, collector, reader."""
