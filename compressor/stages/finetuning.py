"""Order the base by importance and fine-tune it once as a super-network: fills `supernet/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor.checks import check_targets
from compressor.inputs import (
    STATE,
    calibration_batches,
    calibration_blocks,
    data_fingerprint,
    text_fingerprint,
    training_blocks,
    weights_fingerprint,
)
from compressor.job import Job
from compressor.recipe import Finetuning, former_names
from compressor.run import Run, band_folder
from compressor.schedule import stage
from compressor.sizing import (
    band_limits,
    sizes_searched_for,
    smallest_in_training,
    training_range,
    uniform_near,
)
from compressor.stages.reading import read_checked
from export.probe import default_ids, logits_of
from search.genes import BITS
from supernet.activation import SuperNetwork
from supernet.common.errors import RequestError, VerificationError
from supernet.common.files import fingerprint
from supernet.common.progress import say
from supernet.importance import IMPORTANCES, block_influence, importance_and_influence
from supernet.loading import load_causal_lm
from supernet.ordering import (
    Order,
    apply_ordering,
    has_hidden,
    load_ordering,
    order_by,
    save_ordering,
    stored_influence,
)
from supernet.routed import FILE as ROUTED
from supernet.routed import RoutedDeltas
from supernet.streaming import StreamedNetwork
from supernet.training.adapters import PARAMETERS
from supernet.training.data import Blocks
from supernet.training.history import History
from supernet.training.losses import Loss
from supernet.training.sharding import full_tensor, shard
from supernet.training.sources import hub_dataset, is_generated
from supernet.training.supernet_training import ElasticScheme, finetune_supernet


def finetuning_inputs(job: Job) -> dict[str, object]:
    """All that the stage reads; another value of any of it makes another super-network."""
    recipe, space = job.recipe, job.declared_space  # which layers are important follows from the model and the data
    least, _ = smallest_in_training(job, space)
    finetuning = former_names(job.given.finetuning.model_dump())
    finetuning["gradient_accumulation"] = finetuning["gradient_accumulation"] or 1  # as where it was 1 when unset
    if finetuning["largest_share"] is None:
        del finetuning["largest_share"]  # as where there was none
    if finetuning["bands"] == 1:
        del finetuning["bands"]
    inputs = {
        "model": job.base_fingerprint,
        "data": text_fingerprint(job, recipe.finetuning.tokens or 0),
        "finetuning": finetuning,
        "space": {name: values for name, values in space.to_dict().items() if name.partition(".")[0] not in BITS},
        "smallest": least.to_dict(),
        "seed": recipe.seed,
    }
    if recipe.finetuning.tokens == 0:  # nothing is drawn, so sizes and samplers do not matter
        inputs = {key: inputs[key] for key in ("model", "data", "seed")} | {"ordering": job.given.finetuning.ordering}
        if job.given.finetuning.sequence_length != Finetuning().sequence_length:  # what is ordered on is so long
            inputs["length"] = job.given.finetuning.sequence_length
    if recipe.text_key is not None:
        inputs["text_key"] = recipe.text_key
    if job.ordering not in IMPORTANCES:
        inputs["ordering_file"] = data_fingerprint(job.ordering)
    return inputs


def check_unchanged(job: Job) -> None:
    """Refuse to throw a super-network and its evaluations away unasked. Before the run's recipe is replaced."""
    run = job.run
    made = run.manifest(run.supernet) is not None
    if job.redo != "finetune":
        check_same_base(job)
    if made and job.redo != "finetune" and not hidden_is_ordered(job):
        raise RequestError(
            f"{run.path}: its residual channels were left as they are, and this space takes the most important of "
            "them; compress with --redo finetune to order them (its evaluations will not count any more), or name "
            "another --output"
        )
    if made and job.redo != "finetune" and not run.whole(run.supernet, finetuning_inputs(job)):
        raise RequestError(
            f"{run.path}: its super-network was fine-tuned from another recipe or data{what_changed(job)}; compress "
            "with --redo finetune to do it again (its evaluations will not count any more), or name another --output"
        )


def what_changed(job: Job) -> str:
    """Which keys that the super-network depends on are others in the run's recipe.yaml, in brackets; nothing where none
    is, as where the text itself changed."""
    before, now = job.run.recipe(), job.given
    changed = [
        f"{name} {was} → {value}"
        for name in ("model", "data", "text_key", "seed", "space")
        if (was := getattr(before, name)) != (value := getattr(now, name))
    ]
    section = now.finetuning.model_dump()
    for key, was in before.finetuning.model_dump().items():
        if was != section[key]:
            changed.append(f"finetuning.{key} {was} → {section[key]}")
    return f" ({', '.join(changed)})" if changed else ""


def check_same_base(job: Job) -> None:
    """Refuse a base whose weights are not those that the run's super-network was made from: what was measured in the
    one would be held against the other."""
    made = (job.run.manifest(job.run.supernet) or {}).get("base")  # earlier versions did not keep it
    if made is not None and made != job.untouched_fingerprint:
        raise RequestError(
            f"{job.run.path}: the weights of {job.given.model} changed since its super-network was made from them; put "
            "those back, or compress these into another --output"
        )


def hidden_is_ordered(job: Job) -> bool:
    """Whether the run's super-network has its residual channels in order, where the space cuts them."""
    return not cuts_hidden(job) or has_hidden(job.run.supernet / "ordering.safetensors")


def cuts_hidden(job: Job) -> bool:
    return any(gene.kind == "hidden_size" for gene in job.declared_space.genes)


def finetune(job: Job) -> dict[str, Any]:
    """Order the base by importance and fine-tune it once as a super-network. Returns the stage's manifest."""
    recipe, run = job.recipe, job.run
    inputs = finetuning_inputs(job)
    if run.whole(run.supernet, inputs) and hidden_is_ordered(job) and job.redo != "finetune":
        remove_state(run)
        return run.manifest(run.supernet) or {}
    check_unchanged(job)
    with run.stage(run.supernet, inputs) as (folder, facts):
        job.accelerator.wait_for_everyone()  # until the folder is as it should be
        job.threads(scoring=False)
        # 1. The base, its units in order of importance: it still says what transformers alone makes of it.
        blocks, contaminated = text_to_train_on(job)
        # What is not trained needs no more precision than it is computed in.
        dtype = job.compute_dtype if recipe.finetuning.parameters == "lora" else torch.float32
        ids = default_ids(job.checkpoint.config)
        own = base_logits(job, ids, dtype)
        model = job.load_base(dtype)
        supernet = job.supernet_of(model)
        order, influence = order_supernet(job, supernet, blocks)
        proof = {"base": difference("the ordered super-network", logits_of(model, ids), own, dtype)}
        job.rank_layers(influence)
        check_targets(job)  # where layers differ in size, what is within reach may not be what it seemed
        facts["block_influence"] = influence
        # 2. The one training.
        history, resumable = History(), folder / STATE
        if recipe.finetuning.tokens:
            history = train_supernet(job, supernet, blocks, resumable)
        if recipe.finetuning.shard:
            model = gathered(job, model)
        # 3. The super-network as it is searched.
        if run.writes:
            save_ordering(order, influence, folder / "ordering.safetensors", job.ordering)
            proof["files"] = store(job, model, folder, ids)
            if isinstance(supernet.variants, RoutedDeltas):
                save_file(supernet.variants.tensors(job.stored_dtype), folder / ROUTED)
        # 4. Of several bands of sizes, the super-networks of the smaller ones.
        if limits := band_limits(job):
            del model, supernet  # two would be in memory
            trained = []
            for band, limit in enumerate(limits, start=1):
                of_band, off = train_band(job, order, blocks, band, band_folder(folder, band), ids)
                trained.append({"below": limit, **vars(of_band)})
                proof["files"] = max(proof.get("files", 0.0), off)
            facts["bands"] = trained
        # 5. What the manifest says.
        if run.writes:
            facts["base"] = job.untouched_fingerprint
            facts["logit_differences"] = proof
            folders = [band_folder(folder, band) for band in range(recipe.finetuning.bands)]
            weights = [weights_fingerprint(each) for each in folders]
            facts["weights"] = weights[0] if len(weights) == 1 else fingerprint(weights)
            facts["finetune"] = {**vars(history), **text_and_settings(job, blocks, contaminated)}
    remove_state(run)  # only now: whatever goes wrong before costs no training
    job.accelerator.wait_for_everyone()  # until the manifest is there
    run.log("fine-tuned")
    return run.manifest(run.supernet) or {}


def text_to_train_on(job: Job) -> tuple[Blocks, set[str]]:
    """The text of the fine-tuning, and names of the report documents that lie in what the run will read.

    All that healing will read too is read here: a row that cannot be read ends the run now, and not after the search.
    Of what the base writes, more is written when it is known how much there is time to heal on.
    """
    tokens, healing = job.recipe.finetuning.tokens or 0, job.recipe.healing.tokens or 0
    most = tokens if is_generated(job.recipe.data or "") else max(tokens, healing)
    blocks, contaminated = read_checked(job, most)
    return training_blocks(job, tokens) if most > tokens else blocks, contaminated


def gathered(job: Job, sharded: Any) -> Any:
    """A whole network with the weights of a sharded one, in the process that writes; every process must ask."""
    state: dict[str, Tensor] = {}
    for name, value in sharded.state_dict().items():
        whole = full_tensor(value)
        if job.run.writes:  # at once on the CPU: beside its shards a GPU may have no room for them
            state[name] = whole.cpu()
    if not job.run.writes:
        return sharded
    model = job.load_base(torch.float32)
    model.load_state_dict(state)
    return model


def text_and_settings(job: Job, blocks: Blocks, contaminated: set[str]) -> dict[str, object]:
    """What the manifest says of a fine-tuning beside its history."""
    recipe, section = job.recipe, job.recipe.finetuning
    return {
        "processes": job.accelerator.num_processes,
        "sampler": section.sampler,
        "parameters": section.parameters,
        "loss": " + ".join(f"{weight:g} {name}" for name, weight in section.losses.items()),
        "data": "text that the base wrote" if is_generated(recipe.data or "") else job.given.data,
        "hub_dataset": hub_dataset(recipe.data or ""),
        "blocks": len(blocks),
        "data_fingerprint": blocks.fingerprint,
        "skipped_rows": blocks.skipped,
        "overlapping_report_documents": len(contaminated),
    }


def remove_state(run: Run) -> None:
    """Remove what the fine-tuning would have gone on from."""
    if run.writes:
        for left in run.supernet.rglob(f"*{STATE}*"):
            left.unlink()


def train_band(
    job: Job, order: Order, blocks: Blocks, band: int, folder: Path, ids: torch.Tensor
) -> tuple[History, float]:
    """Fine-tune the super-network of a band of smaller sizes, in the `order` of the first, and write it to `folder`;
    the second number is as `store` returns it."""
    supernet = job.supernet_of(job.load_base(torch.float32 if job.recipe.finetuning.parameters == "all" else None))
    apply_ordering(supernet, order)
    folder.mkdir(exist_ok=True)
    history = train_supernet(job, supernet, blocks, folder / STATE, band)
    return history, store(job, supernet.model, folder, ids) if job.run.writes else 0.0


def store(job: Job, model: Any, folder: Path, ids: torch.Tensor) -> float:
    """Write a super-network as it is searched. Returns how far what is cut from its files is off, as `difference`."""
    # As stored, so that what is searched is what will be shipped, bit for bit.
    trained = logits_of(model, ids)
    # Under the names of the parameters, so that sub-networks can be cut out of the files.
    model.to(job.stored_dtype).save_pretrained(folder, save_original_format=False)
    job.tokenizer.save_pretrained(folder)
    cut = StreamedNetwork(folder, job.checkpoint.config, job.structure, job.structure.base)
    whole = cut.logits(ids, job.stored_dtype)
    return difference("what is cut from the super-network's files", whole, trained, job.stored_dtype)


def base_logits(job: Job, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the base says of `ids` where transformers alone loads it: with nothing read from its configuration by us."""
    model, _ = load_causal_lm(job.checkpoint.path, dtype, job.recipe.trust_remote_code)
    return logits_of(model.to(job.device).eval(), ids)


def difference(what: str, logits: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest difference of logits, as a share of the largest logit; units in another order are summed in another.

    Raises `VerificationError` where it is more than rounding: then something was read otherwise than transformers does.
    """
    share = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not share <= (1e-3 if dtype == torch.float32 else 0.1):
        raise VerificationError(
            f"{what} differs from the network that it is made of by {share:.2g} of the largest logit"
        )
    return share


@stage("ordering")
def order_supernet(job: Job, supernet: SuperNetwork, blocks: Blocks) -> tuple[Order, list[float]]:
    """Permute units as the recipe says; returns the permutations, and how important each layer is.

    `ordering` names a criterion, which is measured on the first blocks of the data, or a file that another run left.
    """
    named = job.ordering
    if named in IMPORTANCES:
        say(f"ordering units by importance ({named}) on {calibration_blocks(job)} blocks of the data")
        scores, influence = importance_and_influence(named, supernet, calibration_batches(job, blocks), job.recipe.seed)
        order = order_by(scores)
        if not cuts_hidden(job):
            del order[None, "hidden"]  # which all weights follow: left alone where no sub-network is narrower
    else:
        say(f"ordering units as in {named}")
        if cuts_hidden(job) and not has_hidden(Path(named)):
            raise RequestError(f"finetuning.ordering: {named}: does not order residual channels, which this space cuts")
        order = load_ordering(Path(named), job.structure)
        influence = stored_influence(Path(named)) or block_influence(supernet, calibration_batches(job, blocks))
    apply_ordering(supernet, order)
    return order, influence


@stage("fine-tuning")
def train_supernet(job: Job, supernet: SuperNetwork, blocks: Blocks, state: Path, band: int = 0) -> History:
    """Fine-tune an ordered super-network in place as the recipe says, or of several that of this band of sizes. `state`
    makes it resumable."""
    section = job.recipe.finetuning
    if section.bands > 1:
        say(f"super-network {band + 1} of {section.bands}, each for a band of sizes")
        section = section.model_copy(update={"tokens": (section.tokens or 0) // section.bands})
    # 1. What is trained, and the sizes whose held-out losses are watched.
    loss = Loss(section.losses, section.temperature)
    scheme = ElasticScheme(section.sampler, section.draw, section.random_members, loss, section.strong_teacher)
    range_ = training_range(job, band)
    watched = {
        "largest": [range_.largest],
        "middle": [uniform_near(job, sum(range_.sizes) / 2)],
        "smallest": [range_.least],
    }
    asked = sizes_searched_for(job)
    if section.bands > 1:  # those of another band are another super-network's
        limits = band_limits(job)
        asked = [size for size in asked if band == sum(size < limit for limit in limits)]
    if asked:
        watched["asked"] = [uniform_near(job, size) for size in asked]
    # 2. The frozen base, where it teaches, and the training.
    model: Any = supernet.model

    def load() -> SuperNetwork:
        """The frozen base, ordered like the super-network, so that heads stand beside the heads they came from."""
        base = job.supernet_of(job.load_base())
        base.model.load_state_dict({name: full_tensor(value) for name, value in model.state_dict().items()})
        if section.shard:
            shard(base)
        return base

    if section.shard:
        shard(supernet)
    make = PARAMETERS[section.parameters]
    return finetune_supernet(
        make(supernet, load if scheme.needs_base else None, section.lora_rank, job.recipe.seed),
        blocks,
        job.in_parts(job.train_settings(section, blocks.length, job.recipe.seed)),
        scheme,
        range_,
        state=state,
        accelerator=job.accelerator,
        watched=watched,
    )
