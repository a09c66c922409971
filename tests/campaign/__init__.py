"""A campaign against the whole tool: spoilt inputs, kills, fuzzed recipes, full disks, hostile files.

    python -m tests.campaign inputs|runs|kills|recipes|disk|code [--minutes N] [--seed N]

Every part makes a good run once and then does its worst to copies of it, until the minutes are over. The last line says
how many were tried and how they ended; every failure is printed with what brings it about. The suite runs a short form
of each part (`tests/test_campaign.py`).
"""
