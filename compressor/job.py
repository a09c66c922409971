"""What the stages of a run share: the checkpoint, tokenizer, tasks, space and device, each opened when first needed."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from compressor.architecture import Architecture, Scheme, Structure
from compressor.checkpoint import Checkpoint, open_checkpoint
from compressor.elastic.importance import IMPORTANCES
from compressor.elastic.ordering import by_influence, load_ordering
from compressor.elastic.supernet import SuperNetwork
from compressor.errors import RequestError, nearest
from compressor.finetune.engine import make_accelerator, processes
from compressor.finetune.loop import TrainSettings
from compressor.finetune.losses import LOSSES
from compressor.finetune.optimizers import OPTIMIZERS, check_optimizer
from compressor.finetune.parameters import PARAMETERS, adapted
from compressor.finetune.samplers import DRAWS, SAMPLERS, Range
from compressor.finetune.sources import local_files
from compressor.recipe import Finetuning, Healing, Recipe, absolute_or_share, byte_count, learning_rate_for
from compressor.run import Run, read_json, write_json
from export import gguf_layout, graphs
from export.layouts import check_installed
from export.quantize import linear_layers
from export.schemes import SCHEMES
from search.algorithms import algorithms
from search.space import SearchSpace

if TYPE_CHECKING:
    from accelerate import Accelerator

    from evals.scoring import Scorer
    from evals.speed_table import SpeedTable
    from evals.tasks import TaskSet

STAGES = ("finetune", "search", "export")
SMALL = 50_000_000
"""Parameters under which one thread scores faster than several: the threads would mostly wait for one another."""

TRIES = 64
"""Uniform draws of a sub-network before what is too small is taken for all that they give."""

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "lm-eval",
    "pymoo",
    "neural-compressor",
    "auto-round",
    "datasets",
)


def versions() -> dict[str, str]:
    """Of Python, of this tool, and of the packages whose versions move results."""
    found = {
        "python": platform.python_version(),
        "nas-compressor": importlib.metadata.version("nas-compressor"),
    }
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


class Job:
    """A run with its recipe resolved, and everything that is expensive to open, opened once.

    `weights` False is for looking only: the checkpoint's configuration is enough.
    """

    def __init__(self, run: Run, recipe: Recipe, redo: str | None = None, *, weights: bool = True) -> None:
        self.run = run
        self.recipe = recipe
        if redo is not None and redo not in STAGES:
            raise RequestError(f"--redo {redo}: no such stage{nearest(redo, STAGES)} (stages are {', '.join(STAGES)})")
        self.redo = redo
        self.weights = weights
        self.speed: SpeedTable | None = None
        self.processes = 1
        """How many processes share this machine's cores at this moment, this one among them."""
        self._passes: dict[str, int] = {}
        self._uniform: dict[SearchSpace, Sequence[Architecture]] = {}

    @cached_property
    def checkpoint(self) -> Checkpoint:
        recipe = self.recipe
        return open_checkpoint(recipe.model, recipe.revision, recipe.trust_remote_code, weights=self.weights)

    @property
    def structure(self) -> Structure:
        return self.checkpoint.structure

    @cached_property
    def base_fingerprint(self) -> str:
        return self.checkpoint.fingerprint()

    @cached_property
    def tokenizer(self) -> Any:
        return self.checkpoint.load_tokenizer()

    @cached_property
    def accelerator(self) -> Accelerator:
        return make_accelerator(self.recipe.device, self.recipe.dtype)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the base's weights, which every unquantized package keeps."""
        dtype = getattr(self.checkpoint.config, "dtype", None) or torch.float32
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """What networks are computed in: float32 on a CPU, where halves are emulated, else the stored dtype."""
        if self.recipe.dtype != "auto":
            return getattr(torch, self.recipe.dtype)
        return torch.float32 if self.device.type == "cpu" else self.stored_dtype

    @cached_property
    def space(self) -> SearchSpace:
        """What may be cut. Where block influence says which layers a depth gene keeps, and before it is measured, this
        is `declared_space`."""
        measured = (self.run.manifest(self.run.supernet) or {}).get("block_influence")
        return self.declared_space if measured is None else self._read_space(by_influence(measured))

    @cached_property
    def declared_space(self) -> SearchSpace:
        """The space as far as the recipe alone says it: layers whose importance is still to be measured stand in the
        order in which they come. How many of them each depth keeps is right, and so are all other sizes."""
        return self._read_space(range(len(self.structure.base.layers)))

    def rank_layers(self, influence: Sequence[float]) -> None:
        """From here on, layers of the space are as important as just measured. Targets are looked at again: where
        layers differ in size, what is within reach may not be what it seemed."""
        self.space = self._read_space(by_influence(influence))
        self.check_targets()

    def _read_space(self, measured_order: Sequence[int]) -> SearchSpace:
        named = self.recipe.space
        try:
            if isinstance(named, dict):
                return SearchSpace.from_dict(named, self.structure, measured_order)
            if Path(named).suffix in (".yaml", ".yml"):
                return SearchSpace.from_dict(yaml.safe_load(Path(named).read_text()), self.structure, measured_order)
            return SearchSpace.preset(named, self.structure)
        except FileNotFoundError as error:
            raise RequestError(f"--space {named}: no such file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RequestError(f"--space {named}: not valid YAML ({' '.join(str(error).split())})") from error
        except ValueError as error:
            raise RequestError(f"--space: {error}") from error

    @cached_property
    def tasks(self) -> TaskSet:
        from evals.encoding import Encoder
        from evals.tasks import TaskSet

        include = [self.recipe.include_path] if self.recipe.include_path else []
        if self.recipe.include_path and not Path(self.recipe.include_path).is_dir():
            raise RequestError(f"--include-path {self.recipe.include_path}: no such folder")
        return TaskSet.load(
            self.recipe.tasks,
            encoder=Encoder(self.tokenizer, self.checkpoint.config),
            include_path=include,
            kept=self.run.requests,
        )

    def scorer(self, model: Any) -> Scorer:
        """Scores `model` with as many passes side by side as is fastest here: found out once, kept with the run."""
        from evals.scoring import NetworkLM, Scorer

        lm = NetworkLM(model, self.tasks.encoder, max_tokens=self.recipe.batch_tokens)
        if self.device.type == "cpu":
            cores = str(self.cores)
            if cores not in self._passes and self.run.passes.is_file():
                self._passes = read_json(self.run.passes)
            if cores not in self._passes:
                lm.tune(self.tasks.questions("search", self.recipe.searching.limit).spans, self.cores)
                self._passes[cores] = lm.workers
                if self.run.search.is_dir():
                    write_json(self.run.passes, self._passes)
            lm.set_workers(self._passes[cores], self.cores)
        return Scorer(self.tasks, lm)

    @property
    def cores(self) -> int:
        """This process's share of the cores."""
        from evals.network import available_cores

        return max(1, available_cores() // self.processes)

    def threads(self, scoring: bool) -> None:
        """Pin torch's threads for training, or for scoring and timing one network at a time."""
        if self.device.type == "cpu":
            small = scoring and self.structure.parameters(self.structure.base) < SMALL
            torch.set_num_threads(1 if small else self.cores)

    def load_base(self, dtype: torch.dtype | None = None) -> Any:
        return self.checkpoint.load_model(dtype or self.compute_dtype, self.device)

    def supernet_of(self, model: Any) -> SuperNetwork:
        return SuperNetwork(model, structure=self.structure)

    def load_supernet(self) -> SuperNetwork:
        """The fine-tuned, ordered super-network of this run. Raises `RequestError` if there is none yet."""
        from transformers import AutoModelForCausalLM

        if self.run.manifest(self.run.supernet) is None:
            raise RequestError(f"{self.run.path}: no fine-tuned super-network yet; run compressor finetune or compress")
        model = AutoModelForCausalLM.from_pretrained(
            self.run.supernet,
            dtype=self.compute_dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=self.recipe.trust_remote_code,
        )
        return self.supernet_of(model.to(self.device).eval())

    def sizes(self) -> list[tuple[str, int | None]]:
        """(name, most parameters) of every package set that the targets ask for: `best`, or `best-0.67` and so on."""
        wanted = self.recipe.targets.max_params
        if not wanted:
            return [("best", None)]
        base = self.structure.parameters(self.structure.base)
        sizes = []
        for size in wanted:
            try:
                sizes.append(absolute_or_share(size, base))
            except ValueError as error:
                raise RequestError(f"--max-params: {error}") from error
        if len(wanted) == 1:
            return [("best", sizes[0])]
        return [(f"best-{re.sub(r'[^0-9A-Za-z.]', '', text)}", size) for text, size in zip(wanted, sizes, strict=True)]

    def max_bytes(self) -> int | None:
        return None if self.recipe.targets.max_bytes is None else byte_count(self.recipe.targets.max_bytes)

    def smallest_scheme(self) -> Scheme | None:
        """How the smallest requested variant stores its linear layers: what `--max-bytes` is about."""
        if not self.recipe.quantizing.schemes:
            return None
        smallest = min((SCHEMES[name] for name in self.recipe.quantizing.schemes), key=lambda s: (s.bits, s.auto_round))
        return smallest.sizes(self.recipe.quantizing.group_size)

    def fill_in(self) -> None:
        """Put what follows from the model into the recipe, where the user said nothing."""
        hidden_size = self.structure.base.hidden_size
        finetuning, healing = self.recipe.finetuning, self.recipe.healing
        if finetuning.learning_rate is None:
            adapters = finetuning.parameters == "lora"
            finetuning.learning_rate = learning_rate_for(hidden_size, healing=False, adapters=adapters)
        if healing.learning_rate is None:
            healing.learning_rate = learning_rate_for(hidden_size, healing=True)

    def check(self) -> None:
        """Look at everything that the recipe names, so that whatever is wrong with it is said before work begins."""
        recipe = self.recipe
        named: list[tuple[str, str, Iterable[str]]] = [
            ("finetuning.sampler", recipe.finetuning.sampler, SAMPLERS),
            ("finetuning.draw", recipe.finetuning.draw, DRAWS),
            *(("finetuning.loss", loss, LOSSES) for loss in recipe.finetuning.losses),
            ("finetuning.parameters", recipe.finetuning.parameters, PARAMETERS),
            ("finetuning.optimizer", recipe.finetuning.optimizer, OPTIMIZERS),
            ("searching.algorithm", recipe.searching.algorithm, algorithms()),
        ]
        for key, name, known in named:
            if name not in known:
                hint = nearest(name, known) or f"; known are {', '.join(known)}"
                raise RequestError(f"{key}: '{name}' is unknown{hint}")
        if recipe.finetuning.parameters == "lora":
            adapted(self.structure)
        check_optimizer(recipe.finetuning.optimizer, self.device.type)
        narrows = any(gene.kind == "hidden_size" for gene in self.space.genes)
        losses = set(recipe.finetuning.losses)
        if narrows and ("hidden" in losses or (losses != {"ce"} and recipe.finetuning.strong_teacher < 1)):
            raise RequestError(
                "--space: where hidden_size is searched, the largest sub-network cannot teach in place and hidden "
                "states cannot be compared; leave finetuning.strong_teacher at 1 and the loss hidden out"
            )
        if recipe.finetuning.shard and (narrows or recipe.finetuning.optimizer == "adamw-8bit"):
            what = "a space that searches hidden_size" if narrows else "finetuning.optimizer: adamw-8bit"
            raise RequestError(f"finetuning.shard: not together with {what}; leave one of the two out")
        to_be_trained = self.redo == "finetune" or self.run.manifest(self.run.supernet) is None
        if recipe.finetuning.shard and to_be_trained and processes() == 1:
            raise RequestError(
                "finetuning.shard: there is one process only; start several with torchrun, or leave it out"
            )
        batch, parts = recipe.finetuning.batch_size or 1, recipe.finetuning.gradient_accumulation
        if batch % (parts * processes()):
            raise RequestError(
                f"finetuning.batch_size: {batch} sequences cannot be shared evenly by {processes()} process(es) in "
                f"{parts} part(s)"
            )
        ordering = recipe.finetuning.ordering
        if Path(ordering).suffix == ".safetensors":
            load_ordering(Path(ordering), self.structure)
        elif ordering not in IMPORTANCES:
            hint = nearest(ordering, IMPORTANCES) or f"; known are {', '.join(IMPORTANCES)}, or a .safetensors file"
            raise RequestError(f"finetuning.ordering: '{ordering}' is unknown{hint}")
        self.check_formats()
        self.checkpoint.load_tokenizer()
        self.check_targets()
        self.check_group_size()
        if not recipe.data:
            raise RequestError("--data is missing; name the text that the model is calibrated and trained on")
        local_files(recipe.data)
        if recipe.speed_table is not None:
            self.given_speed_table()
        if recipe.tasks:
            self.check_tasks()
        self.checkpoint.check_finite()

    def check_formats(self) -> None:
        """Refuse a layout or a quantization that this network cannot have."""
        model_type = self.checkpoint.config.model_type
        for layout in self.recipe.formats:
            check_installed(layout)
            if layout in ("onnx", "openvino"):
                graphs.check_family(layout, model_type)
            elif layout.startswith("gguf"):
                gguf_layout.check_family(model_type)
                gguf_layout.check_tokenizer(self.tokenizer)
        if self.recipe.quantizing.schemes:
            linear_layers(self.checkpoint.config, self.recipe.trust_remote_code)

    def check_tasks(self) -> None:
        """Refuse a task without documents, and a document that does not fit the context; no weights are needed."""
        self.tasks.questions("search", self.recipe.searching.limit)
        self.tasks.questions("report")

    def given_speed_table(self) -> SpeedTable:
        """The speed table that the recipe names. Raises `RequestError` where it is none, or of another network."""
        from evals.speed_table import SpeedTable

        name = self.recipe.speed_table
        assert name is not None
        try:
            table = SpeedTable.load(Path(name))
        except FileNotFoundError as error:
            raise RequestError(f"speed_table: {name}: no such file") from error
        except ValueError as error:
            raise RequestError(f"speed_table: {error}") from error
        if not table.fits(self.structure):
            raise RequestError(
                f"speed_table: {name}: was measured on a network of other sizes; make one with "
                f"python -m compressor.speed_table {self.recipe.model} FILE"
            )
        return table

    def check_targets(self) -> None:
        """Refuse targets that no sub-network of the space can reach, with the smallest size that it holds, and targets
        that contradict one another."""
        smallest = self.space.smallest()
        least = self.structure.parameters(smallest)
        base = self.structure.parameters(self.structure.base)
        sizes = self.sizes()
        for _, size in sizes:
            if size is not None and size < least:
                raise RequestError(
                    f"--max-params: {size:,} parameters cannot be reached; the smallest sub-network of this space has "
                    f"{least:,} ({least / base:.3f} of the base)"
                )
            if size is not None and size >= base:
                raise RequestError(
                    f"--max-params: {size:,} parameters are no fewer than the base's {base:,}; ask for less"
                )
        if len({size for _, size in sizes}) < len(sizes):
            raise RequestError(f"--max-params: {','.join(self.recipe.targets.max_params)} names one size twice")
        if len(sizes) > 1 and self.recipe.targets.max_drop is not None:
            raise RequestError(
                "--max-drop asks for the smallest network of a quality, several --max-params for the best one of each "
                "size; give one of the two"
            )
        limit = self.max_bytes()
        if limit is not None:
            bytes_ = self.structure.bytes(smallest, self.smallest_scheme())
            if limit < bytes_:
                raise RequestError(
                    f"--max-bytes: {limit:,} bytes cannot be reached; the smallest sub-network of this space takes "
                    f"{bytes_:,} bytes as asked for"
                )

    def check_group_size(self) -> None:
        """Refuse a group size of the user's that does not divide an input width that the space can give a layer."""
        group = self.recipe.quantizing.group_size
        if group is None or all(SCHEMES[name].bits > 4 for name in self.recipe.quantizing.schemes):
            return
        genes = {gene.name: gene.values for gene in self.space.genes}
        base = self.structure.base
        widths = set(genes.get("hidden_size", (base.hidden_size,)))
        for index, layer in enumerate(base.layers):
            widths |= set(genes.get(f"ffn.{index}", genes.get("ffn", (layer.intermediate_size,))))
            per_group = self.structure.head_dim * layer.num_attention_heads // max(layer.num_key_value_heads, 1)
            widths |= {per_group * kv for kv in genes.get(f"kv.{index}", genes.get("kv", (layer.num_key_value_heads,)))}
        for width in sorted(widths - {0}):
            if width % group or group % 32:
                common = math.gcd(*(widths - {0}))
                valid = [size for size in (128, 64, 32) if common % size == 0]
                what = f"does not divide the width {width}" if width % group else "is not a multiple of 32"
                raise RequestError(
                    f"--group-size: {group} {what}; "
                    + (
                        f"valid are {', '.join(map(str, valid))}"
                        if valid
                        else "leave it out: layers choose for themselves"
                    )
                )

    def train_settings(self, section: Finetuning | Healing, length: int, seed: int) -> TrainSettings:
        """The loop's settings for a section of the recipe, after `fill_in`."""
        assert section.tokens is not None and section.learning_rate is not None
        finetuning = self.recipe.finetuning
        assert finetuning.batch_size is not None
        chosen: dict[str, Any] = {}
        if isinstance(section, Finetuning):
            names = ("schedule", "warmup_share", "tail_share", "weight_decay", "clip", "move_idle")
            chosen = {name: getattr(section, name) for name in names}
        return TrainSettings(
            tokens=section.tokens,
            batch_size=finetuning.batch_size,
            sequence_length=length,
            learning_rate=section.learning_rate,
            seed=seed,
            accumulation=finetuning.gradient_accumulation,
            optimizer=finetuning.optimizer,
            gradient_checkpointing=finetuning.gradient_checkpointing,
            **chosen,
        )

    def training_range(self) -> Range:
        """The sub-networks that the fine-tuning trains."""
        least, low = self.smallest_in_training()

        def uniform(rng: np.random.Generator) -> Architecture:
            """Every gene uniformly, drawn again where the sub-network is smaller than what is trained. Of a space that
            holds next to nothing else, one that just is not."""
            for _ in range(TRIES):
                drawn = self.space.decode(self.space.sample(rng)[0].tolist())
                if self.structure.parameters(drawn) >= low:
                    return drawn
            return self.draw_near(rng, low)

        return Range(self.structure, least, uniform, self.draw_near, self.uniform_near)

    def smallest_in_training(self, space: SearchSpace | None = None) -> tuple[Architecture, float]:
        """The small end of the fine-tuning: a little under the smallest size asked for, a half where none is.

        A uniform cut near that size, so that the small end is a sensible network; sizes below it are not trained.
        Of `space`, or else of the run's own.
        """
        space = space or self.space
        base = self.structure.parameters(self.structure.base)
        share = self.recipe.finetuning.smallest_share
        if share is None:
            asked = [size / base for _, size in self.sizes() if size is not None]
            share = 0.85 * min(asked, default=0.6)
        low = max(share * base, self.structure.parameters(space.smallest()))
        return self.uniform_near(low, space), low

    def draw_near(self, rng: np.random.Generator, parameters: float, space: SearchSpace | None = None) -> Architecture:
        """A random sub-network of about this many parameters, of `space` or else of the run's own."""
        space = space or self.space
        return space.decode(space.sample_near(rng, [parameters])[0].tolist())

    def uniform_near(self, parameters: float, space: SearchSpace | None = None) -> Architecture:
        """The uniform cut nearest in size, of `space` or else of the run's own; a random one where there is none."""
        space = space or self.space
        if space not in self._uniform:
            self._uniform[space] = space.uniform_members(12)
        if not self._uniform[space]:
            return self.draw_near(np.random.default_rng(self.recipe.seed), parameters, space)
        return min(self._uniform[space], key=lambda a: abs(self.structure.parameters(a) - parameters))
