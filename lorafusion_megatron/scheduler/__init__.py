"""Grouping, packing, merging, dependency repair, validation and simulation: pure functions over frozen data."""
