"""End-to-end benchmark: this package beside the ways in which others train the same jobs, in one process group."""
