"""The mod that runs the rest of any Flower ClientApp inside a batch job."""
