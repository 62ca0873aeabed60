"""Records and tests of the losses."""
