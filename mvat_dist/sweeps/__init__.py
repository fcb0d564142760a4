"""What a sweep file says, what a trial has recorded, and the Slurm jobs of a sweep."""
