"""Everything about a request that can be refused before work begins, each in one line that says what would be valid."""

from __future__ import annotations

import math
from pathlib import Path

from compressor.generated import repeated
from compressor.job import Job
from compressor.memory_needs import without_room
from compressor.recipe import Finetuning
from compressor.sizing import (
    byte_limit,
    input_widths,
    is_held_in_space,
    largest_in_training,
    package_bytes,
    parameter_limits,
    picks_bits,
    picks_types,
    sizes_searched_for,
    smallest_storage,
)
from compressor.stages.finalists import check_rounds
from compressor.stages.llama_types import smallest_file
from export.layouts import graphs, padded
from export.layouts.gguf import checks as gguf_checks
from export.layouts.gguf import tokenizer as gguf_tokenizer
from export.layouts.installed import check_installed
from export.layouts.table import GGUF_MIXED
from export.quantization.plan import linear_layers
from export.quantization.schemes import SCHEMES
from supernet.common.errors import RequestError
from supernet.common.formatting import percent, size
from supernet.common.progress import say
from supernet.ordering import load_ordering
from supernet.routed import check_routed
from supernet.tokens import no_row, tokens_without_row
from supernet.training.accelerator import processes
from supernet.training.adapters import adapted
from supernet.training.optimizers import check_optimizer
from supernet.training.sources import GENERATED, is_generated, local_files, other_files, read_rows


def check(job: Job) -> None:
    """Look at everything that the recipe names. Raises `RequestError` for the first thing that is wrong with it."""
    recipe = job.recipe
    check_ordering(job)
    check_finetuning(job)
    if job.length < recipe.finetuning.sequence_length != Finetuning().sequence_length:
        say(f"note: finetuning.sequence_length: {job.length:,} tokens are read at once, all that this network can")
    if recipe.time is None:
        check_budgets(job)
    check_tokens(job)
    check_weights_by_size(job)
    check_bits(job)
    check_formats(job)
    check_targets(job)
    check_group_size(job)
    if not recipe.data:
        raise RequestError("--data is missing; name the text that the model is calibrated and trained on")
    (check_generated if is_generated(recipe.data) else check_data)(job)
    if recipe.speed_table is not None:
        job.given_speed_table()
    if recipe.tasks:
        check_tasks(job)
    job.checkpoint.check_finite()
    hint_at_vocabulary(job)


LARGE_VOCABULARY = 0.2
"""Share of the parameters from which a vocabulary that nobody asked to cut is pointed out."""


def hint_at_vocabulary(job: Job) -> None:
    """Say where much of the network is its vocabulary, which no search over layers makes smaller."""
    structure = job.structure
    tables = structure.vocab_size * structure.base.hidden_size * (1 if structure.tied else 2)
    share = tables / structure.parameters(structure.base)
    new = not job.run.recipe_file.is_file()
    if new and job.recipe.vocabulary.size is None and share >= LARGE_VOCABULARY:
        say(
            f"note: the vocabulary holds {percent(share)} of the parameters; --vocabulary auto drops tokens that the "
            "text does not need, before anything is cut out of layers"
        )


def check_data(job: Job) -> None:
    """Read local training text once, all of it, so that its last row fails before the first step and not after it."""
    recipe = job.recipe
    assert recipe.data is not None
    if local_files(recipe.data) is None:
        return
    if unread := other_files(recipe.data):
        say(f"warning: --data {recipe.data}: {len(unread)} files are of other kinds and not read, such as {unread[0]}")
    if not sum(1 for _ in read_rows(recipe.data, recipe.text_key)):
        raise RequestError(f"--data {recipe.data}: no row has a text")


def say_what_is_repeated(job: Job) -> None:
    """Say how often trainings read the same text, where the base writes it and no more of it was asked for."""
    if is_generated(job.recipe.data or "") and (over := repeated(job)) is not None:
        say(f"--data {job.given.data}: {over}")


def check_generated(job: Job) -> None:
    """Refuse what makes no sense where the base writes the text, and say what else the words may have meant."""
    source = job.given.data
    if job.recipe.text_key is not None:
        raise RequestError("--text-key: text that the base writes has no columns; leave it out")
    if job.recipe.time is None:
        say_what_is_repeated(job)
    for name in dict.fromkeys((str(source), GENERATED)):
        if Path(name).exists():
            say(f"warning: --data {source}: the base writes the text; what lies here as {name} is read as ./{name}")


def check_ordering(job: Job) -> None:
    """Refuse an ordering of another network."""
    ordering = job.ordering
    if Path(ordering).suffix == ".safetensors":
        load_ordering(Path(ordering), job.structure)


def check_finetuning(job: Job) -> None:
    """Refuse choices of the fine-tuning that do not go together, or not with this machine."""
    finetuning = job.recipe.finetuning
    if finetuning.parameters == "lora":
        adapted(job.structure)
    if finetuning.parameters == "routed":
        check_routed(job.structure, finetuning.lora_rank)
        if finetuning.shard or any(gene.kind == "hidden_size" for gene in job.space.genes):
            what = "finetuning.shard" if finetuning.shard else "a space that searches hidden_size"
            raise RequestError(f"finetuning.parameters: routed is not together with {what}")
    if (largest := largest_in_training(job)) != job.structure.base:
        most = job.structure.parameters(largest)
        if above := [size for size in sizes_searched_for(job) if size > most]:
            raise RequestError(
                f"finetuning.largest_share: {above[0]:,} parameters are asked for, no more than {most:,} are trained"
            )
    if finetuning.bands > 1:
        others = {
            "finetuning.parameters: routed": finetuning.parameters == "routed",
            "finetuning.shard": finetuning.shard,
        }
        for other in (name for name, asked in others.items() if asked):
            raise RequestError(f"finetuning.bands: not together with {other}; leave one of the two out")
        if not finetuning.tokens:
            raise RequestError("finetuning.bands: nothing is trained (--train-tokens 0), so all would be alike")
    check_optimizer(job.optimizer, job.device.type)
    narrows = any(gene.kind == "hidden_size" for gene in job.space.genes)
    losses = set(finetuning.losses)
    if narrows and ("hidden" in losses or (losses != {"ce"} and finetuning.strong_teacher < 1)):
        raise RequestError(
            "--space: where hidden_size is searched, the largest sub-network cannot teach in place and hidden "
            "states cannot be compared; leave finetuning.strong_teacher at 1 and the loss hidden out"
        )
    if finetuning.shard and (narrows or job.optimizer == "adamw-8bit"):
        what = "a space that searches hidden_size" if narrows else "finetuning.optimizer: adamw-8bit"
        raise RequestError(f"finetuning.shard: not together with {what}; leave one of the two out")
    to_be_trained = job.redo == "finetune" or job.run.manifest(job.run.supernet) is None
    if finetuning.shard and to_be_trained and processes() == 1:
        raise RequestError("finetuning.shard: there is one process only; start several with torchrun, or leave it out")
    batch, parts = finetuning.batch_size or 1, job.parts_of_batch
    if batch % (parts * processes()):
        raise RequestError(
            f"finetuning.batch_size: {batch} sequences cannot be shared evenly by {processes()} process(es) in "
            f"{parts} part(s)"
        )


def check_bits(job: Job) -> None:
    """Refuse what a search of sizes and bits cannot go together with."""
    space, recipe = job.space, job.recipe
    if not space.bits:
        return
    if not job.quantizable:
        raise RequestError("--space: genes of bits are for networks whose weights are in linear layers")
    if any(gene.kind == "hidden_size" for gene in space.genes):
        raise RequestError("--space: genes of bits and hidden_size do not go together; leave one out")
    if "bytes" not in recipe.searching.objectives:
        raise RequestError(
            "searching.objectives: where bits are searched, bytes must be among them, such as quality,bytes"
        )
    others = {
        "quantizing.bits: joint": recipe.quantizing.bits == "joint",
        "healing.finalists": recipe.healing.finalists > 1,
        **{f"--format {layout}": True for layout in recipe.formats if layout != "uneven"},  # of one width each
        "greedy": "greedy" in (recipe.searching.algorithm, *recipe.searching.warm_start),
    }
    for other in (name for name, asked in others.items() if asked):
        raise RequestError(f"{other}: not together with a space that has genes of bits; leave one out")


def check_budgets(job: Job) -> None:
    """Refuse budgets, a plan's among them, that finalists cannot share, or that a GPU has no memory for."""
    healing = job.recipe.healing
    if healing.tokens and healing.finalists > 1:  # before anything is searched for
        check_rounds(job, healing.finalists)
    check_memory(job)


def check_memory(job: Job) -> None:
    """Refuse training that a GPU has no memory for, by what `inspect` expects of it. What was trained is done."""
    instead = {
        "fine-tuning": "train adapters (finetuning.parameters: lora), share the layers among several GPUs "
        "(finetuning.shard), or search the base as it is (--train-tokens 0)",
        "healing": "leave it out (--heal-tokens 0), or ask for a smaller network",
    }
    for stage, (expected, free) in without_room(job).items():
        raise RequestError(f"{stage} takes about {size(expected)}, this GPU has {size(free)} free: {instead[stage]}")


def check_weights_by_size(job: Job) -> None:
    """Refuse what has one set of weights for all sizes, or fits another, beside weights that depend on the size."""
    if choice := job.recipe.finetuning.weights_by_size:
        for other, asked in (("--repair off", job.repairs), ("no --format elastic", "elastic" in job.recipe.formats)):
            if asked:
                raise RequestError(f"{choice} gives sizes weights of their own; say {other}")


def check_formats(job: Job) -> None:
    """Refuse a layout or a quantization that this network cannot have."""
    config = job.checkpoint.config
    for layout in job.recipe.formats:
        check_installed(layout)
        if layout == "elastic" and job.repairs:
            raise RequestError(
                "--format elastic: holds one set of weights, and this run repairs what it cuts, which gives every size "
                "its own; search without (--repair off)"
            )
        if layout == "padded":
            padded.check_family(config)
        elif layout in ("onnx", "openvino"):
            graphs.check_family(layout, config.model_type)
        elif layout.startswith("gguf"):
            if layout == GGUF_MIXED:
                check_mixed_types(job)
            try:
                gguf_checks.check_family(config, {tensor.name for tensor in job.structure.tensors})
                gguf_tokenizer.check_tokenizer(job.tokenizer)
            except RequestError as error:
                named = str(error) if "--format" in str(error) else f"--format {layout}: {error}"
                raise RequestError(named) from error
            if not gguf_checks.holds_uneven(config) and "uniform" not in job.recipe.formats:
                raise RequestError(
                    f"--format {layout}: llama.cpp holds {config.model_type} networks only where all layers are alike; "
                    f"let one be picked for it: --format uniform,{layout}"
                )
    quantizing = job.recipe.quantizing
    if quantizing.bits == "joint" and job.recipe.targets.max_bytes is None:
        raise RequestError("--bits joint: picks what fits a number of bytes; name it with --max-bytes")
    if quantizing.schemes or quantizing.bits == "joint":
        linear_layers(config, job.recipe.trust_remote_code)
    for scheme in quantizing.schemes:
        if not is_held_in_space(job, scheme):
            raise RequestError(
                f"--quantize {scheme}: needs widths that are multiples of 32, and the residual stream's is "
                f"{job.structure.base.hidden_size}, which every layer reads or writes; ask for int8"
            )
    check_embedding(job)


def check_mixed_types(job: Job) -> None:
    """Refuse types of llama.cpp that fit, where nothing is to be fitted, or what they cost is not measured."""
    if job.recipe.targets.max_bytes is None:
        raise RequestError(
            f"--format {GGUF_MIXED}: its types are those that fit a number of bytes; name it with --max-bytes (of a "
            "run that was searched: compressor pick RUN --max-bytes)"
        )
    if not job.quantizable:
        raise RequestError(
            f"--format {GGUF_MIXED}: is for networks whose weights are in linear layers; name a type, such as gguf-q4_k"
        )


def check_embedding(job: Job) -> None:
    """Refuse bits of the embedding that no package asked for can hold; say once where a plain class keeps bfloat16."""
    recipe, asked = job.recipe, job.recipe.quantizing.embedding
    schemes, joint = recipe.quantizing.schemes, picks_bits(job)
    files = any(layout.startswith("gguf") for layout in recipe.formats)
    if asked is not None and not (schemes or joint or files or job.declared_space.bits):
        raise RequestError(f"quantizing.embedding: {asked} bits, but nothing is quantized; say --quantize int4")
    if not (schemes or joint) or asked == 16:
        return
    holds = "layouts that hold a quantized embedding are uneven (compressed-tensors) and gguf"
    if schemes and asked is not None and all(SCHEMES[name].auto_round for name in schemes):
        raise RequestError(f"quantizing.embedding: {asked} bits, but auto-round's own form holds none; {holds}")
    if job.structure.tied and set(recipe.formats) == {"uniform"}:
        if asked is not None:
            raise RequestError(
                f"quantizing.embedding: {asked} bits, but a plain class holds no quantized embedding that is the head "
                f"too; {holds}"
            )
        say(f"the embedding stays in 16 bits: a plain class holds no quantized one that is the head too; {holds}")


def check_tokens(job: Job) -> None:
    """Tokens of the tokenizer that have no row in the embedding: refused where all text needs them, named otherwise.
    Text that has one is refused where it is read; llama.cpp's files leave them out."""
    tokenizer, rows = job.tokenizer, job.structure.vocab_size
    beyond = tokens_without_row(tokenizer, rows)
    if not beyond:
        return
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    needed = [(token, index) for token, index in beyond if index in marks]
    if needed:
        raise RequestError(f"{job.given.model}: {no_row(*needed[0], rows)}")
    say(f"warning: {job.given.model}: {no_row(*beyond[0], rows)} ({len(beyond)} tokens in all)")


def check_tasks(job: Job) -> None:
    """Refuse a task without documents, and a document that does not fit the context; no weights are needed."""
    job.tasks.requests("search", job.recipe.searching.limit)
    job.tasks.requests("report")


def check_targets(job: Job) -> None:
    """Refuse targets that no sub-network of the space can reach, with the smallest size that it holds, and targets
    that contradict one another."""
    smallest = job.space.smallest()
    least = job.structure.parameters(smallest)
    base = job.structure.parameters(job.structure.base)
    limits = parameter_limits(job)
    for _, most in limits:
        if most is not None and most < least:
            raise RequestError(
                f"--max-params: {most:,} parameters cannot be reached; the smallest sub-network of this space has "
                f"{least:,} ({least / job.untouched_parameters:.3f} of the base)"
            )
        if most is not None and most >= base:
            cut = "" if job.vocabulary is None else ", with its vocabulary cut"
            raise RequestError(
                f"--max-params: {most:,} parameters are no fewer than the base's {base:,}{cut}; ask for less"
            )
    if len({most for _, most in limits}) < len(limits):
        raise RequestError(f"--max-params: {','.join(job.recipe.targets.max_params)} names one size twice")
    if len(limits) > 1 and job.recipe.targets.max_drop is not None:
        raise RequestError(
            "--max-drop asks for the smallest network of a quality, several --max-params for the best one of each "
            "size; give one of the two"
        )
    limit = byte_limit(job)
    if limit is not None:
        storage = smallest_storage(job, smallest)
        bytes_ = job.structure.bytes(smallest, storage)
        if picks_types(job):
            bytes_ = smallest_file(job, smallest)
        elif picks_bits(job):  # where size and bits are picked together, it is of files with their headers
            bytes_ = package_bytes(job.structure, smallest, storage)
        if limit < bytes_:
            raise RequestError(
                f"--max-bytes: {limit:,} bytes cannot be reached; the smallest sub-network of this space takes "
                f"{bytes_:,} bytes as asked for"
            )


def check_group_size(job: Job) -> None:
    """Refuse a group size of the user's that does not divide an input width that the space can give a layer."""
    group = job.recipe.quantizing.group_size
    if group is None or not job.quantizable:
        return
    widths = input_widths(job)
    for width in sorted(widths):
        if width % group or group % 32:
            common = math.gcd(*widths)
            valid = [size for size in (128, 64, 32) if common % size == 0]
            what = f"does not divide the width {width}" if width % group else "is not a multiple of 32"
            raise RequestError(
                f"--group-size: {group} {what}; "
                + (f"valid are {', '.join(map(str, valid))}" if valid else "leave it out: layers choose for themselves")
            )
