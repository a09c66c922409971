"""What every package uses and what imports none of ours: errors, progress, formatting, files, versions, processes."""
