"""Leaves that every package uses: errors, progress, formatting, files, versions, processes."""
