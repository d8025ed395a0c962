"""The run file: dataclasses, checks, loader."""
