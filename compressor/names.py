"""Every name that a recipe or an option takes, known without importing torch, so that a mistyped one is refused at
once. `tests/compressor/test_names.py` holds these against the tables that give the names their meaning.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

SPACES = ("llama-nas", "instatune", "depth", "uniform", "fine", "simq")
ORDERINGS = ("magnitude", "activation", "wanda", "taylor", "learned", "surgeon", "random")
SAMPLERS = ("sandwich", "joint", "alternate")
DRAWS = ("sizes", "cuts", "genes", "shift")
LOSSES = ("ce", "kl", "hidden", "relations")
TRAINED = ("all", "lora", "routed")
OPTIMIZERS = ("muon", "adamw", "adamw-8bit")
ALGORITHMS: Mapping[str, str] = {
    "linas": "evolution guided by predictors that are trained on what was measured (the default)",
    "ehvi": "LINAS, two at a time, by the hypervolume that they are expected to add",
    "nsga2": "non-dominated sorting and crowding distance",
    "age-moea": "survival by an estimated geometry of the front (needs numba)",
    "unsga3": "reference directions with niching, for three objectives and more",
    "random": "uniform draws, to compare with",
    "greedy": "one unit cut after the other, the one that degrades least",
}
BASELINES = (
    "shortgpt",
    "late-block",
    "sleb",
    "minitron-depth",
    "nemotron-depth",
    "minitron-width",
    "magnitude",
    "wanda",
    "taylor",
    "flap",
    "slicegpt",
)
WARM_STARTS = ("greedy", "blockwise", "published", "router", "superposition")
OWN_METHODS = ("random", "untrained-search", "scratch")
"""What a comparison makes to show what each part of ours adds."""
FORMATS: Mapping[str, str] = {
    "uneven": "every layer its own sizes, with a small code file beside the weights (the default)",
    "uniform": "all layers alike, a plain network that loads everywhere",
    "padded": "the uneven network made plain with zeros, as large as the base in each layer",
    "elastic": "any size of the front in one package: the super-network itself, unhealed",
    "gguf": "llama.cpp, 16-bit floats",
    "gguf-f32": "llama.cpp, 32-bit floats",
    "gguf-bf16": "llama.cpp, bfloat16",
    "gguf-q8_0": "llama.cpp, 8 bits",
    "gguf-q6_k": "llama.cpp, 6 bits",
    "gguf-q5_k": "llama.cpp, 5 bits",
    "gguf-q5_1": "llama.cpp, 5 bits, for widths that 256 does not divide",
    "gguf-q4_k": "llama.cpp, 4 bits",
    "gguf-iq4_nl": "llama.cpp, 4 bits with values denser around zero",
    "gguf-q4_0": "llama.cpp, 4 bits, the simplest",
    "gguf-q3_k": "llama.cpp, 3 bits",
    "gguf-q2_k": "llama.cpp, 2 bits",
    "gguf-mixed": "llama.cpp, every half-block in a type of its own, chosen to fit --max-bytes",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
}
TRACKERS: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
"""Trackers of experiments, each with the modules of which one must be installed."""
FRONT_ORDERS = ("size", "quality", "speed", "loss")
"""By what `compressor front` sorts."""
REDOABLE = ("finetune", "search", "export")
RECIPES = Path(__file__).parent / "recipes"
"""The folder of the recipes that come with the program."""


def recipes() -> dict[str, Path]:
    """The recipes that come with the program, by the name that `--recipe` takes."""
    return {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}


def lm_eval_tasks() -> list[str]:
    """The names of lm-eval's tasks and groups as its files say them, sorted: a quarter of a second, where lm-eval's own
    index takes ten. Tasks of a language or a tag that are made from a name and a suffix are among them."""
    named = rb"^\s*(?:- )?[\"']?(?:task|group|tag)[\"']?: *[\"']?([^\s\"'#\[\]{},]+)"
    names = {name.decode(errors="replace") for text in _task_files() for name in re.findall(named, text, re.M)}
    return sorted(names)


def in_lm_eval(name: str) -> bool:
    """Whether lm-eval's task files say this name anywhere as a word; False is certain."""
    wanted = re.compile(rb"(?<![\w-])" + re.escape(name.encode()) + rb"(?![\w-])")
    return any(wanted.search(text) for text in _task_files())


@functools.cache
def _task_files() -> list[bytes]:
    """The content of every task file of lm-eval, which is not imported for that."""
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(spec.submodule_search_locations[0]) / "tasks"
    files = [Path(folder) / name for folder, _, names in os.walk(root) for name in names if name.endswith(".yaml")]
    return [file.read_bytes() for file in files]
