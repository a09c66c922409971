"""Run by test_finetune_processes under torchrun: fine-tunes whole and sharded layers, one sharded run with a kill.

python -m torch.distributed.run --nproc_per_node 2 -m tests.support.sharded FOLDER
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from supernet.activation import SuperNetwork
from supernet.training import supernet_training as elastic
from supernet.training.adapters import PARAMETERS
from supernet.training.data import Blocks, pack
from supernet.training.history import History
from supernet.training.sharding import full_tensor, shard
from supernet.training.supernet_training import ElasticScheme, finetune_supernet
from supernet.training.traces import trace
from tests.support import tiny
from tests.support.finetune_helpers import CUT, SMALL, range_of, settings

KINDS = ("all", "muon"), ("all", "adamw"), ("lora", "muon")
"""What is trained, and by which optimizer."""
STEPS = 8
SCHEME = ElasticScheme("alternate", random_members=2)  # half of the steps leave slices inactive


def train(
    network: LlamaForCausalLM,
    blocks: Blocks,
    parameters: str,
    optimizer: str,
    sharded: bool,
    state: Path,
    rate: float = 1e-3,
    watched: bool = False,
) -> History:
    """Fine-tune, from `state` where it exists, and leave it there."""
    supernet = SuperNetwork(network)
    if sharded:
        shard(supernet)
        assert isinstance(network.model.layers[0].mlp.up_proj.weight, DTensor)
    return finetune_supernet(
        PARAMETERS[parameters](supernet, None, 4, 7),
        blocks,
        settings(32 * STEPS, checkpoint_seconds=0, weight_decay=0.1, learning_rate=rate, optimizer=optimizer),
        SCHEME,
        range_of(supernet.structure),
        state=state,
        accelerator=Accelerator(),
        watched={"largest": [supernet.base], "middle": [CUT], "smallest": [SMALL]} if watched else None,
    )


def main(folder: Path) -> None:
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    if accelerator.is_main_process:
        tiny.data(folder / "data.jsonl")
    accelerator.wait_for_everyone()
    blocks = pack(str(folder / "data.jsonl"), tiny.byte_tokenizer(), 16)
    start = tiny.llama().train()

    def keep(name: str, network: LlamaForCausalLM) -> None:
        tensors = {name: full_tensor(value.detach()).clone() for name, value in network.named_parameters()}
        if accelerator.is_main_process:
            save_file(tensors, folder / name)

    keep("start", start)
    for parameters, optimizer in KINDS:
        kind = f"{parameters}-{optimizer}"
        for how, sharded in (("plain", False), ("whole", True)):
            network = copy.deepcopy(start)
            train(network, blocks, parameters, optimizer, sharded, folder / f"{kind}-{how}-state")
            keep(f"{kind}-{how}", network)
        state, passes = folder / f"{kind}-killed-state", 0

        def dies(*arguments: object) -> object:
            nonlocal passes
            passes += 1
            if passes == 8:  # in the midst of a step: the largest in one, two random ones in the next
                raise KeyboardInterrupt
            return trace(*arguments)

        elastic.trace = dies
        try:
            train(copy.deepcopy(start), blocks, parameters, optimizer, True, state)
        except KeyboardInterrupt:
            elastic.trace = trace
        accelerator.wait_for_everyone()
        network = copy.deepcopy(start)
        train(network, blocks, parameters, optimizer, True, state)
        keep(f"{kind}-resumed", network)
    # At a rate that loses it, all processes go back alike, with whole and with sharded layers.
    ends = {}
    for how, sharded in (("plain", False), ("whole", True)):
        network = copy.deepcopy(start)
        ends[how] = train(
            network, blocks, "all", "adamw", sharded, folder / f"lost-{how}-state", rate=1e3, watched=True
        )
        keep(f"lost-{how}", network)
    assert [history.halved for history in ends.values()] == [[2, 4, 6]] * 2
    assert [history.kept for history in ends.values()] == [0, 0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
