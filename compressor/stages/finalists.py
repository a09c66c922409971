"""Which of the nearest picks to heal: each on a share of the tokens, the better half on more, and so on to one.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943), as DarwinLM (arXiv 2502.07780) chooses among its
offspring by training them. All rounds together read as many tokens as healing one pick does, and the best goes on with
the last round. What was healed is kept in `subnets/` until the best is known, so an interrupted choice goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, inf, log2
from pathlib import Path
from typing import TypedDict

import torch

from compressor.job import Job
from compressor.stages.picks import PickRecord
from compressor.stages.subnet_files import Inputs, cut_inputs, cut_network, is_made_from, load_healed
from export.package import write_package
from export.package_record import read_record
from search.preference import Preference, ordered
from supernet.architecture import Architecture
from supernet.common.errors import RequestError, reading
from supernet.common.files import fingerprint, read_json, write_json
from supernet.common.progress import say
from supernet.training.data import HELD_OUT_BLOCKS, Blocks
from supernet.training.losses import held_out_loss
from supernet.training.settings import TrainSettings
from supernet.training.supernet_training import heal

FURTHER_SEED = 7919
"""Between the seeds of two rounds, which draw other text."""


class Round(TypedDict):
    """What a round of a choice gave."""

    tokens: int
    """That each network read."""
    losses: dict[str, float]
    """Held-out losses behind it by the networks' keys, nats per token."""


@dataclass(frozen=True)
class Start:
    """Where the last round begins: the best finalist as the rounds before it left it."""

    folder: Path
    inputs: str
    """Fingerprint of all that it depends on."""
    tokens_left: int
    """Tokens of the last round."""
    seed: int
    """Seed of the last round."""


def rounds_of(finalists: int, tokens: int) -> list[tuple[int, int]]:
    """(networks, tokens for each) of every round: the same tokens in each round, half as many networks as in the one
    before it, one in the last."""
    rounds = ceil(log2(finalists)) + 1
    counts = [ceil(finalists / 2**number) for number in range(rounds)]
    plan = [(count, tokens // rounds // count) for count in counts]
    spent = sum(count * each for count, each in plan[:-1])
    return [*plan[:-1], (1, tokens - spent)]


def check_rounds(job: Job, finalists: int) -> None:
    """Raise `RequestError` where so many finalists share fewer tokens than each takes a step of."""
    tokens, step = job.recipe.healing.tokens or 0, (job.recipe.finetuning.batch_size or 1) * job.length
    if min(each for _, each in rounds_of(finalists, tokens)) < step:
        raise RequestError(
            f"healing.finalists: {finalists} networks share {tokens:,} tokens, and a step takes {step:,}; "
            "give more --heal-tokens, or fewer finalists"
        )


def best_finalist(job: Job, picked: PickRecord, blocks: Blocks) -> tuple[PickRecord, Start | None]:
    """A pick with the best of its finalists in the place of what was picked, and where its last round begins; the pick
    as it is, and None, where the recipe asks for no more than one.

    Raises `RequestError` where a round would have no token for each network.
    """
    healing = job.recipe.healing
    finalists = picked.get("finalists", [])[: healing.finalists]
    if not healing.tokens or len(finalists) < 2:
        if healing.tokens and healing.finalists > 1:
            say(f"{picked['name']}: healed by itself, for no other was picked beside it that could be a finalist")
        return picked, None
    if len(finalists) < healing.finalists:
        say(f"{picked['name']}: {len(finalists)} finalists, for no more were measured that are as near")
    plan = rounds_of(len(finalists), healing.tokens)
    check_rounds(job, len(finalists))
    with reading(f"{job.run.picks}: not what this version writes; run compressor pick"):
        networks = [Architecture.from_dict(row["architecture"]) for row in finalists]
        keys = [network.key for network in networks]
        places = {row["key"]: row for row in finalists}
        if keys != list(places):
            raise ValueError("keys of finalists are not those of their architectures")
    # 1. What was chosen before is as it was.
    rounds = _Rounds(job, picked, blocks, plan)
    file = job.run.subnets / f"{picked['name']}-finalists.json"
    by = [] if rounds.prefer == "quality" else [rounds.prefer]
    wanted = fingerprint([keys, plan, rounds.inputs_of(keys[0], 0), *by])
    with reading(f"{file}: not what this version writes; remove it"):
        known = dict(read_json(file)) if file.is_file() else {}
    best = str(known.get("best"))
    if known.get("inputs") != wanted or not is_made_from(rounds.folder(best), rounds.inputs_of(best)):
        # 2. Round after round, the better half of what is left.
        best, record = rounds.run(networks)
        write_json(file, {"inputs": wanted, "best": best, "rounds": record})
        for folder in job.run.subnets.glob(f"{picked['name']}-finalist-*"):
            if folder != rounds.folder(best):
                shutil.rmtree(folder)
    start = Start(rounds.folder(best), fingerprint(rounds.inputs_of(best)), plan[-1][1], rounds.seed(len(plan) - 1))
    return {**picked, **places[best]}, start


class _Rounds:
    """The rounds of one pick but the last. Every network of every round is kept in `subnets/NAME-finalist-KEY-ROUND`,
    its held-out loss with it."""

    def __init__(self, job: Job, picked: PickRecord, blocks: Blocks, plan: list[tuple[int, int]]) -> None:
        self.job, self.name, self.blocks, self.plan = job, picked["name"], blocks, plan
        self.prefer: Preference = picked.get("prefer", "quality")
        finalists = picked.get("finalists", [])
        self._speeds = {row["key"]: row["values"].get("decode_tps") or 0.0 for row in finalists}

    def run(self, left: list[Architecture]) -> tuple[str, list[Round]]:
        """The key of the best finalist, and the tokens and held-out losses of every round, nats per token."""
        record: list[Round] = []
        self.job.run.subnets.mkdir(exist_ok=True)
        for number, (count, tokens) in enumerate(self.plan[:-1]):
            say(f"{self.name}: round {number + 1} of the finalists: {count} networks, {tokens:,} tokens each")
            losses = {a.key: self.loss(a, number) for a in left[:count]}
            left = self.ordered(left[:count], losses)
            record.append({"tokens": tokens, "losses": losses})
        shown = ", ".join(f"{key[:8]} {loss:.4f}" for key, loss in record[0]["losses"].items())
        say(f"{self.name}: {left[0].key[:8]} is the best of the finalists (held-out losses after a round: {shown})")
        return left[0].key, record

    def ordered(self, left: list[Architecture], losses: Mapping[str, float]) -> list[Architecture]:
        """In the order in which they go on, by what the pick preferred; of the same loss, the nearer pick stays."""
        whole = 0.0
        if self.prefer != "quality":
            _, held_out = self.blocks.split()
            part = held_out.part(0, HELD_OUT_BLOCKS)
            whole = held_out_loss(self.job.load_base(), part, self.settings(0).batch_size, self.job.device)
        places = ordered(self.prefer, [losses[a.key] for a in left], [self._speeds[a.key] for a in left], whole)
        return [left[place] for place in places]

    def folder(self, key: str, number: int | None = None) -> Path:
        """Where a network is as a round left it, by default the last but one of all."""
        number = len(self.plan) - 2 if number is None else number
        return self.job.run.subnets / f"{self.name}-finalist-{key[:8]}-{number}"

    def seed(self, number: int) -> int:
        return self.job.recipe.seed + 1 + FURTHER_SEED * number

    def settings(self, number: int) -> TrainSettings:
        section = self.job.recipe.healing.model_copy(update={"tokens": self.plan[number][1]})
        return self.job.train_settings(section, self.blocks.length, self.seed(number))

    def inputs_of(self, key: str, number: int | None = None) -> Inputs:
        """All that a network depends on as a round left it, by default the last but one of all."""
        number = len(self.plan) - 2 if number is None else number
        job = self.job
        read = {"base": job.base_fingerprint, "data": self.blocks.fingerprint, "dtype": str(job.compute_dtype)}
        rounds = [asdict(self.settings(one)) for one in range(number + 1)]
        return {**cut_inputs(job, key), **read, "finalist": rounds}

    def loss(self, architecture: Architecture, number: int) -> float:
        """The held-out loss of a finalist after a round; it is healed from what the round before left, where that was
        not done yet."""
        job, key = self.job, architecture.key
        folder, inputs = self.folder(key, number), self.inputs_of(key, number)
        if is_made_from(folder, inputs):
            loss = read_record(folder).entry.held_out_loss
            return inf if loss is None else loss
        cut = cut_network(job, architecture)
        if number:
            network = load_healed(cut, self.folder(key, number - 1), torch.float32).to(job.device)
        else:
            network = cut.built(torch.float32, job.device)
        state = job.run.subnets / f".{self.name}-{fingerprint(inputs)}.training.safetensors"
        job.threads(scoring=False)
        with job.schedule.stage("healing"):
            base, settings = job.load_base(), job.in_parts(self.settings(number))
            history = heal(network, base, self.blocks, settings, state=state, accelerator=job.accelerator)
        loss = (history.best or {}).get("loss", inf)
        write_package(
            network,
            folder,
            tokenizer=job.tokenizer,
            entry={"name": folder.name, "architecture": architecture.to_dict(), "held_out_loss": loss},
            dtype=torch.float32,  # the next round's steps are smaller than half precision holds
            lineage={"inputs": fingerprint(inputs), "supernet": job.run.supernet_weights},
        )
        for left in job.run.subnets.glob(f"{state.name}*"):
            left.unlink()
        return loss
