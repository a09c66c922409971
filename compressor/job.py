"""What the stages of a run share: the checkpoint, tokenizer, tasks, space and device, each opened when first needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from compressor.local_paths import LocalPaths, localized
from compressor.names import REDOABLE
from compressor.recipe import Finetuning, Healing, Recipe
from compressor.run import Run, band_folder
from compressor.schedule import Schedule
from compressor.training_defaults import MUON_WIDTH, WARMUP_AFTER_REPAIR, learning_rate_for
from evals.speed.table import SpeedTable
from export.quantization.plan import linear_layers
from export.vocabulary_record import VOCABULARY, CutVocabulary
from search.space import SearchSpace
from supernet.activation import SuperNetwork
from supernet.architecture import Architecture, Structure
from supernet.checkpoint import Checkpoint, open_checkpoint
from supernet.common.errors import RequestError, reading, unknown
from supernet.common.files import load_yaml, read_json, write_json
from supernet.common.processes import available_cores
from supernet.device import parts_of_batch, pass_tokens
from supernet.loading import check_fit, load_causal_lm
from supernet.ordering import by_influence
from supernet.training.accelerator import make_accelerator, processes
from supernet.training.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from evals.scoring.scorer import Scorer
    from evals.scoring.tasks import TaskSet

SMALL = 50_000_000
"""Parameters under which one thread scores faster than several: the threads would mostly wait for one another."""


def threads_to_score(parameters: int, cores: int) -> int:
    """Threads of torch's for scoring or timing one network of so many parameters at a time, of the cores there are."""
    return 1 if parameters < SMALL else cores


class Job:
    """A run with its recipe resolved, and everything that is expensive to open, opened once.

    `given` is the recipe as the user wrote it, which recipe.yaml, fingerprints and reports hold; `recipe` is the same
    with everything local named by where it lies (`paths`, the run's own by default). `weights` False is for looking
    only: the checkpoint's configuration is enough.
    """

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        redo: str | None = None,
        *,
        weights: bool = True,
        paths: LocalPaths | None = None,
    ) -> None:
        self.run = run
        self.given = recipe
        self.paths = run.local_paths() if paths is None else paths
        self.recipe = localized(recipe, run.path, self.paths)
        if redo is not None and redo not in REDOABLE:
            raise unknown("--redo", redo, REDOABLE)
        self.redo = redo
        self.weights = weights
        self.schedule = Schedule(run.times_file if run.writes else None)
        self.speed: SpeedTable | None = None
        self.processes = 1
        """How many processes share this machine's cores at this moment, this one among them."""
        self._passes: dict[str, int] = {}
        self.uniform_cuts: dict[SearchSpace, Sequence[Architecture]] = {}
        """Uniform cuts of a space, listed once (`compressor.sizing.uniform_near`)."""

    @cached_property
    def untouched(self) -> Checkpoint:
        """The checkpoint that the recipe names: what quality, speed and reports compare with."""
        return self.checkpoint if self.recipe.vocabulary.size is None else self._open_named()

    def _open_named(self) -> Checkpoint:
        recipe = self.recipe
        return open_checkpoint(recipe.model, recipe.revision, recipe.trust_remote_code, weights=self.weights)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The base of the super-network, which also teaches: the untouched checkpoint, or what the run cut its
        vocabulary to (`use_base`)."""
        if self.recipe.vocabulary.size is None:
            return self._open_named()
        if (self.run.base / VOCABULARY).is_file():
            return self.cut_checkpoint(self.run.base)
        if self.run.manifest(self.run.supernet) is not None:
            raise RequestError(f"{self.run.base}: the base of this run is missing; compress again to make it anew")
        return self.untouched

    def cut_checkpoint(self, folder: Path) -> Checkpoint:
        """The base with a smaller vocabulary in this folder, under the name of the untouched one."""
        made = open_checkpoint(str(folder), trust_remote_code=self.recipe.trust_remote_code)
        return replace(made, name=self.untouched.name)

    def use_base(self, folder: Path) -> None:
        """From here on, the checkpoint in this folder is the base of the super-network."""
        for name in ("checkpoint", "base_fingerprint", "tokenizer", "tasks", "space", "declared_space", "vocabulary"):
            self.__dict__.pop(name, None)
        self.checkpoint = self.cut_checkpoint(folder)

    @cached_property
    def vocabulary(self) -> CutVocabulary | None:
        """What the base's vocabulary was cut to; None where it was not."""
        if self.checkpoint is self.untouched:
            return None
        return CutVocabulary.read(self.checkpoint.path / VOCABULARY)

    @property
    def structure(self) -> Structure:
        return self.checkpoint.structure

    @property
    def untouched_parameters(self) -> int:
        """Parameters of the untouched checkpoint, of which targets are shares."""
        return self.untouched.structure.parameters(self.untouched.structure.base)

    @cached_property
    def quantizable(self) -> bool:
        """Whether compressed-tensors can hold the network: most weights are in linear layers."""
        try:
            linear_layers(self.checkpoint.config, self.recipe.trust_remote_code)
        except RequestError:
            return False
        return True

    @cached_property
    def base_fingerprint(self) -> str:
        return self.checkpoint.fingerprint()

    @cached_property
    def untouched_fingerprint(self) -> str:
        return self.base_fingerprint if self.checkpoint is self.untouched else self.untouched.fingerprint()

    @cached_property
    def tokenizer(self) -> Any:
        return self.checkpoint.load_tokenizer()

    @cached_property
    def untouched_tokenizer(self) -> Any:
        return self.tokenizer if self.checkpoint is self.untouched else self.untouched.load_tokenizer()

    @cached_property
    def accelerator(self) -> Accelerator:
        return make_accelerator(self.recipe.device, self.recipe.dtype, self.recipe.report_to, self.run.tracking)

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
        """What networks are computed in: float32 on a CPU, where halves are emulated, bfloat16 on a GPU, unless the
        recipe says otherwise. (Float16 overflows in some networks; float32 is several times slower on a GPU.)"""
        if self.recipe.dtype != "auto":
            return getattr(torch, self.recipe.dtype)
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def length(self) -> int:
        """Tokens in a sequence of training: what the recipe says, or the context where that is shorter."""
        context = getattr(self.checkpoint.config, "max_position_embeddings", None) or 10**9
        return min(self.recipe.finetuning.sequence_length, context)

    @property
    def batch_tokens(self) -> int:
        """Tokens to score in one pass."""
        return self.recipe.batch_tokens or (4096 if self.device.type == "cpu" else pass_tokens(self.device))

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
        """From here on, layers of the space are as important as just measured."""
        self.space = self._read_space(by_influence(influence))

    def _read_space(self, measured_order: Sequence[int]) -> SearchSpace:
        named = self.recipe.space
        try:
            if isinstance(named, dict):
                return SearchSpace.from_dict(named, self.structure, measured_order)
            if Path(named).suffix in (".yaml", ".yml"):
                return SearchSpace.from_dict(
                    load_yaml(Path(named).read_text(encoding="utf-8")), self.structure, measured_order
                )
            return SearchSpace.preset(named, self.structure)
        except FileNotFoundError as error:
            raise RequestError(f"--space {named}: no such file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RequestError(f"--space {named}: not valid YAML ({' '.join(str(error).split())})") from error
        except ValueError as error:
            raise RequestError(f"--space: {error}") from error

    @cached_property
    def untouched_tasks(self) -> TaskSet:
        """The tasks in the tokens of the untouched checkpoint."""
        # These import lm-eval and datasets, a second that looking at a network does not need.
        from evals.scoring.encoding import Encoder
        from evals.scoring.tasks import TaskSet

        include = [self.recipe.include_path] if self.recipe.include_path else []
        if self.recipe.include_path and not Path(self.recipe.include_path).is_dir():
            raise RequestError(f"--include-path {self.recipe.include_path}: no such folder")
        return TaskSet.load(
            self.recipe.tasks,
            encoder=Encoder(self.untouched_tokenizer, self.untouched.config),
            include_path=include,
            kept=self.run.requests,
        )

    @cached_property
    def tasks(self) -> TaskSet:
        """The tasks in the tokens of the base."""
        from evals.scoring.encoding import Encoder  # as above

        if self.checkpoint is self.untouched:
            return self.untouched_tasks
        return self.untouched_tasks.encoded_by(Encoder(self.tokenizer, self.checkpoint.config))

    def scorer(self, model: Any, tasks: TaskSet | None = None) -> Scorer:
        """Scores `model` with as many passes side by side as is fastest here: found out once, kept with the run.

        `tasks` are `untouched_tasks` for the untouched checkpoint.
        """
        from evals.scoring.lm import NetworkLM  # as above
        from evals.scoring.scorer import Scorer  # as above

        tasks = tasks or self.tasks
        lm = NetworkLM(model, tasks.encoder, max_tokens=self.batch_tokens)
        if self.device.type == "cpu":
            cores = str(self.cores)
            if cores not in self._passes and self.run.passes.is_file():
                self._passes = read_json(self.run.passes)
            if cores not in self._passes:
                lm.tune(tasks.requests("search", self.recipe.searching.limit).spans, self.cores)
                self._passes[cores] = lm.workers
                if self.run.search.is_dir():
                    write_json(self.run.passes, self._passes)
            lm.set_workers(self._passes[cores], self.cores)
        return Scorer(tasks, lm)

    @property
    def cores(self) -> int:
        """This process's share of the cores."""
        return max(1, available_cores() // self.processes)

    def threads(self, scoring: bool) -> None:
        """Pin torch's threads for training, or for scoring and timing one network at a time."""
        if self.device.type == "cpu":
            parameters = self.structure.parameters(self.structure.base)
            torch.set_num_threads(threads_to_score(parameters, self.cores) if scoring else self.cores)

    def load_base(self, dtype: torch.dtype | None = None) -> Any:
        return self.checkpoint.load_model(dtype or self.compute_dtype, self.device)

    def load_untouched(self, dtype: torch.dtype | None = None) -> Any:
        return self.untouched.load_model(dtype or self.compute_dtype, self.device)

    def supernet_of(self, model: Any) -> SuperNetwork:
        return SuperNetwork(model, structure=self.structure)

    def supernet_folder(self, architecture: Architecture | None = None) -> Path:
        """Where the super-network lies that a sub-network is cut out of: of several bands of sizes, that of its own.
        That of the largest sizes where none is given."""
        bands = (self.run.manifest(self.run.supernet) or {}).get("bands", [])
        if architecture is None or not bands:
            return self.run.supernet
        parameters = self.structure.parameters(architecture)
        return band_folder(self.run.supernet, sum(parameters < band["below"] for band in bands))

    def load_supernet(self, architecture: Architecture | None = None) -> SuperNetwork:
        """The fine-tuned, ordered super-network of this run; of several bands of sizes, as `supernet_folder` says.
        Raises `RequestError` if there is none yet."""
        if self.run.manifest(self.run.supernet) is None:
            raise RequestError(f"{self.run.path}: no fine-tuned super-network yet; run compressor finetune or compress")
        folder = self.supernet_folder(architecture)
        with reading(f"{folder}: damaged; remove {self.run.supernet} to fine-tune again"):
            model, info = load_causal_lm(folder, self.compute_dtype, self.recipe.trust_remote_code)
        check_fit(str(folder), info)
        return self.supernet_of(model.to(self.device).eval())

    def fill_in(self) -> None:
        """Put what follows from the model into the recipe, where the user said nothing."""
        for recipe in (self.given, self.recipe):
            finetuning = recipe.finetuning
            recipe.repair.enabled = self.repairs
            finetuning.ordering = self.ordering
            finetuning.optimizer = self.optimizer
            if finetuning.learning_rate is None:
                what = "adapters" if finetuning.parameters == "lora" else "fine-tuning"
                finetuning.learning_rate = self.learning_rate(what)

    @property
    def repairs(self) -> bool:
        """Whether what is cut is repaired: as the recipe says, else as this run began, else where little is trained, no
        elastic package is asked for, which has one set of weights for all sizes, and nothing else changes weights."""
        enabled = self.recipe.repair.enabled
        if enabled is None:
            enabled = self._begun.repair.enabled if self._begun else None
        if enabled is None:
            little = self.recipe.trains_little(self.structure.parameters(self.structure.base))
            return little and "elastic" not in self.recipe.formats and not self.recipe.finetuning.weights_by_size
        return enabled

    @cached_property
    def _begun(self) -> Recipe | None:
        """The recipe that the run's super-network is made by; None where its training has not begun."""
        return self.run.recipe() if self.run.trains and self.run.recipe_file.is_file() else None

    def learning_rate(self, what: str) -> float:
        """The peak rate of one of `RATES`, where the recipe names none."""
        return learning_rate_for(what, self.structure.base.hidden_size, self.weight_scale)

    @property
    def optimizer(self) -> str:
        """What trains: as the recipe says, else as this run began, else by the width."""
        begun = self._begun.finetuning.optimizer if self._begun else None
        narrow = self.structure.base.hidden_size <= MUON_WIDTH
        return self.recipe.finetuning.optimizer or begun or ("muon" if narrow else "adamw")

    @property
    def ordering(self) -> str:
        """How units are ordered: as the recipe says, else by what does best with the repair, or without it."""
        return self.recipe.finetuning.ordering or ("surgeon" if self.repairs else "wanda")

    @cached_property
    def weight_scale(self) -> float | None:
        """Root mean square of the base's weights; None where only its configuration is looked at."""
        return self.checkpoint.weight_scale() if self.weights else None

    def given_speed_table(self) -> SpeedTable:
        """The speed table that the recipe names. Raises `RequestError` where it is none, or of another network."""
        name = self.recipe.speed_table
        assert name is not None
        if not Path(name).is_file():
            raise RequestError(f"speed_table: {name}: no such file")
        try:
            table = SpeedTable.load(Path(name))
        except RequestError as error:
            raise RequestError(f"speed_table: {error}") from error
        if not table.fits(self.structure):
            raise RequestError(
                f"speed_table: {name}: was measured on a network of other sizes; make one with "
                f"compressor speed-table {self.recipe.model} FILE"
            )
        return table

    @property
    def parts_of_batch(self) -> int:
        """Parts that each process computes its share of a batch in."""
        finetuning = self.recipe.finetuning
        if finetuning.gradient_accumulation is not None:
            return finetuning.gradient_accumulation
        rows = max(1, (finetuning.batch_size or 1) // processes())
        length, checkpointing = finetuning.sequence_length, finetuning.gradient_checkpointing
        return parts_of_batch(self.structure, rows, length, self.device, checkpointing)

    def in_parts(self, settings: TrainSettings) -> TrainSettings:
        """The same, with batches computed in as many parts as this device needs."""
        return replace(settings, accumulation=self.parts_of_batch)

    def train_settings(
        self, section: Finetuning | Healing, length: int, seed: int, repaired: bool | None = None
    ) -> TrainSettings:
        """The loop's settings for a section of the recipe, after `fill_in`; to heal a network that was `repaired` or
        not, by default as this run does."""
        finetuning, rate = self.recipe.finetuning, section.learning_rate
        assert section.tokens is not None and finetuning.batch_size is not None
        chosen: dict[str, Any] = {}
        if isinstance(section, Finetuning):
            names = ("schedule", "warmup_share", "tail_share", "weight_decay", "clip")
            chosen = {name: getattr(section, name) for name in names} | {"move_idle": section.move_inactive}
        elif self.repairs if repaired is None else repaired:
            chosen, rate = {"warmup_share": WARMUP_AFTER_REPAIR}, rate or self.learning_rate("healing after repair")
        else:
            rate = rate or self.learning_rate("healing")
        assert rate is not None
        return TrainSettings(
            tokens=section.tokens,
            batch_size=finetuning.batch_size,
            sequence_length=length,
            learning_rate=rate,
            seed=seed,
            accumulation=finetuning.gradient_accumulation or 1,
            optimizer=self.optimizer,
            gradient_checkpointing=finetuning.gradient_checkpointing,
            **chosen,
        )
