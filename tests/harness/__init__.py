"""The harness: what a record (``OpSpec``) says, and the checks that every record goes through."""
