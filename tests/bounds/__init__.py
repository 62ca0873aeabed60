"""Tests of the structured layers."""
