"""The tests: one table of records, the harness that runs it, and each method's own tests."""
