"""One engine a file, its contract as a table; a new file is found by its name."""
