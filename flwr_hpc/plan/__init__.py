"""Which parallel plan trains a model best at a facility, by a performance model. No torch."""
