"""Sizes: the limits that the targets set, and the range of sizes that the fine-tuning trains."""

from __future__ import annotations

import math
import re
from math import gcd

import numpy as np

from compressor.job import Job
from export.layouts.table import GGUF_MIXED
from export.quantization.schemes import SCHEMES, EmbeddingBits, SchemeName, outer_bits
from export.shards import header_bytes
from search.genes import AS_STORED
from search.sampling import sample, sample_near, uniform_members
from search.space import SearchSpace
from supernet.architecture import GROUP_SIZES, Architecture, StorageFormat, Structure
from supernet.common.errors import RequestError
from supernet.common.formatting import parse_bytes, parse_parameters
from supernet.slicing import fits_plain_class
from supernet.training.samplers import TrainingRange

BELOW_LARGEST = 0.98
"""Share of the largest size up to which sub-networks are drawn."""
BELOW_SMALLEST = 0.85
"""Share of the smallest size that is asked for down to which sub-networks are trained and searched."""
TRIES = 64
"""Uniform draws of a sub-network before a space is taken to hold nothing but what is too small."""


def parameter_limits(job: Job) -> list[tuple[str, int | None]]:
    """(name, most parameters) of every package set that the targets ask for: `best`, or `best-0.67` and so on."""
    wanted = job.recipe.targets.max_params
    if not wanted:
        return [("best", None)]
    base = job.untouched_parameters
    limits = []
    for size in wanted:
        try:
            limits.append(parse_parameters(size, base))
        except ValueError as error:
            raise RequestError(f"--max-params: {error}") from error
    if len(wanted) == 1:
        return [("best", limits[0])]
    return [(f"best-{size_label(text)}", limit) for text, limit in zip(wanted, limits, strict=True)]


def size_label(size: str) -> str:
    """A size as it was asked for, as a part of a file's name: `67%` is 0.67."""
    text = size.strip()
    if text.endswith("%"):
        text = f"{float(text[:-1]) / 100:g}"
    return re.sub(r"[^0-9A-Za-z.]", "", text)


def sizes_asked_for(job: Job) -> list[int]:
    """The most parameters of every package set, where the targets limit them."""
    return [limit for _, limit in parameter_limits(job) if limit is not None]


def sizes_searched_for(job: Job) -> list[int]:
    """The most parameters that the search looks for, and the searches that it goes on from."""
    searches = [*(search.targets for search in job.recipe.searching.earlier), job.recipe.searched_for]
    return [parse_parameters(size, job.untouched_parameters) for targets in searches for size in targets.max_params]


def byte_limit(job: Job) -> int | None:
    """The bytes of `--max-bytes`."""
    return None if job.recipe.targets.max_bytes is None else parse_bytes(job.recipe.targets.max_bytes)


JOINT: tuple[SchemeName, ...] = ("int8", "int4", "int3", "int2")
"""Schemes that are compared where size and bits are picked together."""
JOINT_EMBEDDINGS: tuple[EmbeddingBits, ...] = (8, 4)


def joint_embeddings(job: Job) -> tuple[EmbeddingBits, ...]:
    """Bits of the embedding that are compared: the recipe's, where it says any."""
    asked = job.recipe.quantizing.embedding
    return JOINT_EMBEDDINGS if asked is None else (asked,)


def picks_bits(job: Job) -> bool:
    """Whether size and bits are picked together: where the recipe says so, or says nothing and limits the bytes. Where
    the search has found bits, they are those."""
    bits = job.recipe.quantizing.bits
    if job.declared_space.bits:
        return False
    if bits is None:
        return job.recipe.targets.max_bytes is not None and job.quantizable
    return bits == "joint"


def picks_types(job: Job) -> bool:
    """Whether the size is picked together with types of llama.cpp: where nothing quantized is asked for but its files,
    and those are of types that fit."""
    formats, schemes = job.recipe.formats, job.recipe.quantizing.schemes
    only = not schemes and all(layout.startswith("gguf") for layout in formats)
    return picks_bits(job) and GGUF_MIXED in formats and only


def storage_of(
    job: Job,
    scheme: SchemeName,
    architecture: Architecture | None = None,
    embedding: EmbeddingBits | None = None,
    uniform: bool | None = None,
) -> StorageFormat:
    """How a quantized package of a sub-network stores its weights; `embedding` is in place of the recipe's bits.

    A network whose layers are alike is written in the family's plain class, which has no code file. Without an
    architecture, one whose layers differ. `uniform`: the package must be of the plain class; by the recipe's formats
    where it is not said.
    """
    quantizing = job.recipe.quantizing
    asked = embedding or quantizing.embedding
    plain = architecture is not None and fits_plain_class(job.checkpoint.config, architecture)
    uniform = set(job.recipe.formats) == {"uniform"} if uniform is None else uniform
    code = not uniform and (not plain or asked is not None)
    outer = outer_bits(SCHEMES[scheme], tied=job.structure.tied, code=code, asked=asked)
    return SCHEMES[scheme].storage_format(quantizing.group_size, outer)


def can_hold(job: Job, scheme: SchemeName, architecture: Architecture) -> bool:
    """Whether a scheme applies to any layer of a sub-network: below 8 bits both widths must be multiples of 32."""
    if SCHEMES[scheme].bits == 8:
        return True
    shapes = [job.structure.shape(tensor, architecture) for tensor in job.structure.tensors if tensor.role == "linear"]
    return any(shape is not None and not (shape[0] % 32 or shape[1] % 32) for shape in shapes)


def is_held_in_space(job: Job, scheme: SchemeName) -> bool:
    """Whether a scheme can apply to any layer of any sub-network, by the residual width, which is one of each linear
    layer's two."""
    genes = {gene.name: gene.values for gene in job.space.genes}
    odd = all(width % 32 for width in genes.get("hidden_size", (job.structure.base.hidden_size,)))
    return not odd or (SCHEMES[scheme].bits == 8 and not SCHEMES[scheme].auto_round)


def input_widths(job: Job) -> set[int]:
    """The input widths that the space can give linear layers inside blocks."""
    genes = {gene.name: gene.values for gene in job.space.genes}
    base = job.structure.base
    widths = set(genes.get("hidden_size", (base.hidden_size,)))
    for index, layer in enumerate(base.layers):
        widths |= set(genes.get(f"ffn.{index}", genes.get("ffn", (layer.intermediate_size,))))
        per_group = job.structure.head_dim * layer.num_attention_heads // max(layer.num_key_value_heads, 1)
        widths |= {per_group * kv for kv in genes.get(f"kv.{index}", genes.get("kv", (layer.num_key_value_heads,)))}
    return widths - {0}


def bits_group(job: Job) -> int:
    """Input channels that share a scale where the space has genes of bits: the recipe's, or the largest number that
    divides every input width that is a multiple of 32."""
    if job.recipe.quantizing.group_size is not None:
        return job.recipe.quantizing.group_size
    common = gcd(*(width for width in input_widths(job) if width % GROUP_SIZES[-1] == 0))
    return next((size for size in GROUP_SIZES if common % size == 0), GROUP_SIZES[-1])


def bits_storage(job: Job) -> StorageFormat:
    """How weights are stored in the bits that an architecture says."""
    return StorageFormat(AS_STORED, bits_group(job), by_architecture=True)


def smallest_storage(
    job: Job, architecture: Architecture | None = None, uniform: bool | None = None
) -> StorageFormat | None:
    """How the smallest requested variant stores its weights: what `--max-bytes` is about. None: unquantized. `uniform`
    as in `storage_of`."""
    if job.declared_space.bits:
        return bits_storage(job)
    if picks_bits(job):
        base = job.structure.base
        widths = {base.hidden_size, *(layer.intermediate_size for layer in base.layers)}
        # Types of llama.cpp of fewer than 4.5 bits are for rows of multiples of 256.
        coarse = picks_types(job) and any(width % 256 for width in widths)
        return storage_of(job, "int4" if coarse else JOINT[-1], architecture, joint_embeddings(job)[-1], uniform)
    if not job.recipe.quantizing.schemes:
        return None
    smallest = min(job.recipe.quantizing.schemes, key=lambda name: (SCHEMES[name].bits, SCHEMES[name].auto_round))
    return storage_of(job, smallest, architecture, uniform=uniform)


def package_bytes(structure: Structure, architecture: Architecture, storage: StorageFormat | None) -> int:
    """The bytes of a package's weight files, headers too."""
    return structure.bytes(architecture, storage) + header_bytes(structure, architecture, storage)


def training_range(job: Job, band: int = 0) -> TrainingRange:
    """The sub-networks that the fine-tuning trains, or those of one band of them, the largest sizes first. Raises
    `RequestError` where the largest is none above the smallest."""
    least, low = smallest_in_training(job)
    largest = largest_in_training(job)
    limits, parameters = band_limits(job), job.structure.parameters
    ends = [parameters(least), BELOW_LARGEST * parameters(largest)]  # of what is drawn
    high = float(parameters(largest))
    if band:
        high = ends[1] = limits[band - 1]
        largest = uniform_near(job, high)
    if band < len(limits):
        low = ends[0] = limits[band]
        least = uniform_near(job, low)

    def uniform(rng: np.random.Generator) -> Architecture:
        """Every gene uniformly, drawn again where the sub-network is smaller or larger than what is trained. Of a space
        that holds next to nothing else, one just above the smallest."""
        for _ in range(TRIES):
            drawn = job.space.decode(sample(job.space, rng)[0].tolist()).without_bits()
            if low <= job.structure.parameters(drawn) <= high:
                return drawn
        return draw_near(job, rng, low)

    return TrainingRange(
        job.structure,
        least,
        largest,
        (ends[0], ends[1]),
        uniform,
        near=lambda rng, parameters: draw_near(job, rng, parameters),
        cut=lambda parameters: uniform_near(job, parameters),
    )


def keep_smallest_share(job: Job) -> None:
    """Put the small end of the fine-tuning into the recipe where the user said nothing: targets of later picks and
    searches do not move what was trained. Runs of earlier versions go on without it."""
    share = smallest_share(job)
    begun = job.run.trains and job.run.recipe_file.is_file()
    if job.recipe.finetuning.smallest_share is None and begun and job.redo != "finetune":
        began = job.run.recipe().finetuning.smallest_share
        if began is None:
            return
        share = began  # as it was trained, whatever is asked for now
    if job.recipe.finetuning.tokens and share < 1:  # above 1 of a base whose vocabulary is cut
        job.given.finetuning.smallest_share = job.recipe.finetuning.smallest_share = share


def smallest_share(job: Job) -> float:
    """The smallest size that is trained, as a share of the base: as the recipe says, else a little under the smallest
    size asked for, a half where none is."""
    share = job.recipe.finetuning.smallest_share
    if share is not None:
        return share
    base = job.structure.parameters(job.structure.base)
    return BELOW_SMALLEST * min((size / base for size in sizes_searched_for(job)), default=0.6)


def smallest_to_search(job: Job) -> float:
    """The fewest parameters that a search looks at: what was trained at the least, or, where less is asked for, as much
    below that as would have been trained for it."""
    trained = smallest_in_training(job)[1]
    asked = min(sizes_searched_for(job), default=math.inf)
    return trained if trained < asked else BELOW_SMALLEST * asked


def smallest_in_training(job: Job, space: SearchSpace | None = None) -> tuple[Architecture, float]:
    """The small end of the fine-tuning, and its parameters.

    A uniform cut near that size, so that the small end is a sensible network; sizes below it are not trained.
    Of `space`, or else of the run's own.
    """
    space = space or job.space
    base = job.structure.parameters(job.structure.base)
    low = max(smallest_share(job) * base, job.structure.parameters(space.smallest()))
    return uniform_near(job, low, space), low


def largest_in_training(job: Job) -> Architecture:
    """The large end of the fine-tuning: the base, or the uniform cut nearest to the largest size that is trained. The
    base where nothing is trained.

    Raises `RequestError` where it is not larger than the smallest.
    """
    base, share = job.structure.base, job.recipe.finetuning.largest_share
    if share is None or share == 1 or job.recipe.finetuning.tokens == 0:
        return base
    largest = uniform_near(job, share * job.structure.parameters(base))
    least, _ = smallest_in_training(job)
    if BELOW_LARGEST * job.structure.parameters(largest) <= job.structure.parameters(least):
        raise RequestError("finetuning.largest_share: must be above the smallest size that is trained")
    return largest


def band_limits(job: Job) -> list[float]:
    """Parameters at which bands of sizes meet, evenly between the largest and the smallest size that is trained; none
    where one super-network has them all. Largest first."""
    _, low = smallest_in_training(job)
    high, count = job.structure.parameters(largest_in_training(job)), job.recipe.finetuning.bands
    return [high + (low - high) * band / count for band in range(1, count)]


def draw_near(job: Job, rng: np.random.Generator, parameters: float, space: SearchSpace | None = None) -> Architecture:
    """A random sub-network of about this many parameters, without bits; of `space` or else of the run's own."""
    space = space or job.space
    return space.decode(sample_near(space, rng, [parameters])[0].tolist()).without_bits()


def uniform_near(job: Job, parameters: float, space: SearchSpace | None = None) -> Architecture:
    """The uniform cut nearest in size, of `space` or else of the run's own; a random one where there is none."""
    space = space or job.space
    if space not in job.uniform_cuts:
        job.uniform_cuts[space] = uniform_members(space, 12)
    if not job.uniform_cuts[space]:
        return draw_near(job, np.random.default_rng(job.recipe.seed), parameters, space)
    return min(job.uniform_cuts[space], key=lambda a: abs(job.structure.parameters(a) - parameters))
