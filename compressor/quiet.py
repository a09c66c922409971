"""Keep what libraries print off the terminal, so that our own progress and messages can be read."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partialmethod

LOGGERS = (
    "torchao",
    "torch.utils._pytree",
    "torch.onnx._internal.exporter._registration",  # by its whole name: torch sets those above it when it is imported
    "transformers",
    "datasets",
    "lm_eval",
    "accelerate",
)
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",  # for processes that we start; in this one tqdm has read it already
    # Threads that spin while they wait slow a second process on the same cores down many times.
    "OMP_WAIT_POLICY": "passive",
}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block libraries print errors only and no bars, unless the environment says otherwise.

    Afterwards levels, variables and bars are as they were: the program that calls us may want to see them.
    """
    # Here: huggingface_hub reads for good, when it is imported, whether it may ask the network, and that is known late.
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from tqdm import tqdm

    with ExitStack() as undo:
        if not are_progress_bars_disabled():
            undo.callback(enable_progress_bars)
            disable_progress_bars()
        undo.callback(setattr, tqdm, "__init__", tqdm.__init__)
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
        for logger in map(logging.getLogger, LOGGERS):
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        for name in ENVIRONMENT.keys() - os.environ.keys():
            undo.callback(os.environ.pop, name, None)
            os.environ[name] = ENVIRONMENT[name]
        yield
