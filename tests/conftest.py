"""What libraries read from the environment when they are imported: no test reaches the hub, and none spins threads."""

import os

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")
