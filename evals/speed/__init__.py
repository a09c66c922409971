"""Speed of networks: measured, and predicted from a table of timings."""
