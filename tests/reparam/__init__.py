"""The reparameterisations."""
