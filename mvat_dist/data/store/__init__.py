"""The packed format: shards and their index, on a disk or at a URL, and the teacher's lessons beside them."""
