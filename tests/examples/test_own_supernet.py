"""The search on a network that reads digits: sizes are exact, and the front is one."""

from __future__ import annotations

import torch

from examples.own_supernet import BLOCKS, ElasticNetwork, main, structure


def test_the_front_of_a_network_that_reads_digits() -> None:
    found = main(evaluations=60)
    assert len(found.evaluations) == 60
    assert max(e.values["accuracy"] for e in found.evaluations) > 0.9  # a tenth is chance
    # How many are on the front depends on the processor: accuracies close to each other may stand the other way round.
    points = {(e.values["parameters"], e.values["accuracy"]) for e in found.evaluations}
    front = {(e.values["parameters"], e.values["accuracy"]) for e in found.front}
    assert front == {(p, a) for p, a in points if not any(q <= p and b >= a and (q, b) != (p, a) for q, b in points)}
    whole, network = structure(), ElasticNetwork()
    for evaluation in found.front:
        network.activate(evaluation.architecture)
        assert evaluation.values["parameters"] == whole.parameters(evaluation.architecture)
        kept = sum(1 for width in network.widths if width)
        outside = sum(p.numel() for module in (network.first, network.last) for p in module.parameters())
        of_blocks = sum(width * (2 * network.first.out_features + 1) for width in network.widths)
        assert evaluation.values["parameters"] == outside + of_blocks + kept * network.first.out_features
    assert len(network.widths) == BLOCKS and network(torch.zeros(1, 64)).shape == (1, 10)
