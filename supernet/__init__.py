"""The elastic super-network: what a checkpoint holds, how units are ordered, cut, activated, sliced and trained."""
