"""How fast this network is on this device: seconds that a pass, a step, a token take.

`measure_rates` times it for some seconds; `estimate_rates` needs no weights, only what a matrix product and a copy
reach here. What a whole stage then takes is `compressor.costs`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from compressor.job import Job
from compressor.sizing import picks_bits, picks_types
from export.models import Model
from export.quantization.autoround_child import BATCH
from export.quantization.cost import step_seconds
from supernet.common.progress import IMPORTED
from supernet.tokens import GREEDY
from supernet.training import muon
from supernet.training.data import Batch
from supernet.training.losses import Loss
from supernet.training.traces import trace

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

EFFICIENCY = 0.5
"""Share of a plain matrix product's rate that a whole training or scoring step is taken to reach."""
GPU_RATE, GPU_BANDWIDTH = 400e12, 2e12
"""Bfloat16 operations and bytes per second that a current data-centre GPU keeps up; for recipes that ask for a GPU
elsewhere."""
DISK_RATE = 500e6
"""Bytes per second that are taken to be read from, or written to, a disk."""
STEP_BYTES = 28
"""Bytes that a step of AdamW reads and writes for each weight: four numbers read, three of them written. Muon's
products of matrices come on top."""
PROCESS, TASKS = 12.0, 18.0
"""Seconds that a fresh process needs at most to import torch and transformers, and then to build lm-eval's tasks and to
render their documents."""
PROBE_SECONDS = 1.0
"""A rate is measured on growing batches until one takes so long."""


class Rates(Model):
    """Seconds that the base takes on this device, in what it is computed in."""

    load: float
    """To load it."""
    read: float
    """To score a token: a forward pass over many."""
    teach: float
    """To read a token in training, without gradients: what a teacher does."""
    train: float
    """A token forward and backward."""
    step: float
    """An optimizer's step over all weights."""
    decode: float
    """One more token after a prompt, with a cache."""
    rounding: float
    """A step of AutoRound's over one block."""
    write: float = 1.0
    """To write text, over what a pass for each token of many rows would take; known when some was written."""
    start: float = PROCESS + TASKS
    """Until a fresh process can score: no more than this one needed until here."""

    @property
    def process(self) -> float:
        """Until a fresh process can load networks."""
        return min(PROCESS, self.start)

    def times(self, **factors: float) -> Rates:
        """The same rates, some of them multiplied."""
        return self.model_copy(update={name: getattr(self, name) * factor for name, factor in factors.items()})


def estimate_rates(job: Job, flops: float | None = None, bandwidth: float | None = None) -> Rates:
    """Rates from counts: operations over what a matrix product reaches here, halved for everything that is not one, and
    bytes over what a copy reaches; or over `flops` and `bandwidth` of another device."""
    structure = job.structure
    flops = (flops or matrix_rate(job.device, job.compute_dtype)) * EFFICIENCY
    bandwidth = bandwidth or copy_rate(job.device)
    total = structure.parameters(structure.base)
    read = 2 * structure.macs(structure.base, job.length // 2) / flops
    weights = total * job.compute_dtype.itemsize
    return Rates(
        load=1.0 + weights / DISK_RATE,
        read=read,
        teach=read,
        train=3 * read,
        step=STEP_BYTES * total / bandwidth + EFFICIENCY * sum(map(muon.operations, orthogonal_shapes(job))) / flops,
        decode=max(weights / bandwidth, len(structure.base.layers) * 2e-4),  # what launching a layer takes
        rounding=BATCH * job.length * 3 * read / len(structure.base.layers),
    )


def orthogonal_shapes(job: Job) -> list[tuple[int, ...]]:
    """Shapes of the base's matrices where Muon trains them; none where another optimizer does."""
    if job.optimizer != "muon":
        return []
    structure = job.structure
    shapes = [structure.shape(tensor, structure.base) for tensor in structure.tensors if tensor.layer is not None]
    return [shape for shape in shapes if shape is not None and muon.is_matrix(shape)]


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square matrix product, the best of a few."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / min(_seconds(device, lambda: a @ a) for _ in range(4))


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a large tensor is read and written with, the best of a few."""
    size = 2**25
    a, b = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / min(_seconds(device, lambda: b.copy_(a)) for _ in range(4))


def measure_rates(job: Job) -> Rates:
    """Rates of this network on this device, each measured until a batch takes a second: half a minute for a network of
    135 M parameters on two cores. What is held at once is the network in float32, or in what is computed in where
    weights are not trained, and the activations of a batch; no gradients and moments of weights."""
    start = min(PROCESS + TASKS, time.monotonic() - IMPORTED)
    began = time.perf_counter()
    trains = job.recipe.finetuning.tokens != 0 or job.recipe.healing.tokens != 0
    in_full = trains and job.recipe.finetuning.parameters != "lora"
    model = job.load_base(torch.float32 if in_full else job.compute_dtype)
    load = time.perf_counter() - began
    job.threads(scoring=False)
    teach, train = training_rates(model, job.accelerator, job.length, job.recipe.finetuning.batch_size or 1)
    job.threads(scoring=True)
    model = model.to(job.compute_dtype)
    read, decode = _scoring_rate(job, model) or teach, decoding_rate(model, job.length)
    job.threads(scoring=False)
    rounding = step_seconds(model, job.length) if tunes(job) else 0.0
    step = STEP_BYTES * job.structure.parameters(job.structure.base) / copy_rate(job.device)
    for shape, number in Counter(orthogonal_shapes(job)).items():
        together = min(number, muon.in_a_stack(math.prod(shape), job.device))
        stack = torch.randn(*([together] if together > 1 else []), *shape, device=job.device)
        step += number / together * min(_seconds(job.device, partial(muon.orthogonal, stack)) for _ in range(2))
    return Rates(
        load=load, read=read, teach=teach, train=train, step=step, decode=decode, rounding=rounding, start=start
    )


def tunes(job: Job) -> bool:
    """Whether weights may be rounded by AutoRound."""
    return bool(job.recipe.quantizing.schemes) or (picks_bits(job) and not picks_types(job))


def training_rates(model: PreTrainedModel, accelerator: Accelerator, length: int, most: int) -> tuple[float, float]:
    """Seconds for each token of a teacher's pass, and of a student's forward and backward, as healing does them, on up
    to `most` rows of `length` tokens. The network's weights are frozen by this.

    Gradients of matrices are counted as one more forward pass (they cost 0.5 to 1 of one on prose-7m, 1.2 on SmolLM2):
    to hold them, and moments, would take four times the memory of a network of which perhaps nothing will be trained.
    """
    model.requires_grad_(False).enable_input_require_grads()
    loss, device, vocabulary = Loss({"kl": 1.0}), model.device, model.config.get_text_config().vocab_size

    def teach(batch: Batch) -> None:
        with torch.no_grad(), accelerator.autocast():
            trace(model, batch)

    def train(batch: Batch) -> None:
        with accelerator.autocast():
            states = trace(model, batch)
            loss(states, states.detached()).backward()

    rows = [_per_row(device, work, most, length, vocabulary) / length for work in (teach, train)]
    model.disable_input_require_grads()
    return rows[0], rows[0] + rows[1]


def decoding_rate(model: PreTrainedModel, length: int) -> float:
    """Seconds of one more token behind a prompt, with a cache; both together are at most `length` tokens."""
    ids = torch.ones((1, max(1, min(32, length // 2))), dtype=torch.long, device=model.device)
    new = max(2, min(8, length // 2))
    options: dict[str, Any] = {**GREEDY, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    def generate(tokens: int) -> float:
        return _seconds(
            ids.device, lambda: model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, **options)
        )

    with torch.no_grad():
        generate(1)  # the first time is slow
        return max(generate(new) - generate(1), 1e-6) / (new - 1)


def _scoring_rate(job: Job, model: torch.nn.Module) -> float | None:
    """Seconds for each token of the tasks' requests; None where there are no tasks, or none that are read."""
    if not job.recipe.tasks:
        return None
    lm = job.scorer(model).lm
    spans = sorted(set(job.tasks.requests("search", job.recipe.searching.limit).spans), key=lambda span: span.tokens)
    many = 16
    while spans:
        plan = lm.plan(spans[:many])
        lm.answer(plan)  # new shapes are slow once
        seconds = _seconds(job.device, lambda plan=plan: lm.answer(plan))  # type: ignore[misc]
        if seconds > PROBE_SECONDS or many >= len(spans):
            return seconds / plan.tokens
        many *= 2
    return None


def _per_row(device: torch.device, work: Callable[[Batch], object], most: int, length: int, vocabulary: int) -> float:
    """Seconds for each row of random tokens, in batches that grow until one takes a second, to `most` rows."""
    work(_random_rows(1, length, vocabulary).to(device))  # the first pass allocates and compiles
    rows = 1
    while True:
        batch = _random_rows(rows, length, vocabulary).to(device)
        seconds = _seconds(device, lambda batch=batch: work(batch))  # type: ignore[misc]
        if seconds < PROBE_SECONDS and rows >= most:  # other work on the machine only ever adds time
            seconds = min(seconds, *(_seconds(device, lambda batch=batch: work(batch)) for _ in range(2)))  # type: ignore[misc]
        if seconds > PROBE_SECONDS or rows >= most:
            return seconds / rows
        rows = min(most, 2 * rows)


def _random_rows(rows: int, length: int, vocabulary: int) -> Batch:
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    return Batch(ids, ids, torch.arange(length).repeat(rows, 1))


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of one call, what it started on a GPU included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
