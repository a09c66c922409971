"""The stages of a run, one file each. Every stage reads what earlier ones left on disk, and nothing else."""
