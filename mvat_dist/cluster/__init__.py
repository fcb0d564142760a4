"""How a run gets its processes: what is to start, where, and once."""
