"""Structured layers: products of sparse factors in the place of dense matrices."""
