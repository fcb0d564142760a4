"""From the records of runs to one page: read, compare, draw, write. Needs neither torch nor a network."""
