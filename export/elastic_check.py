"""What is proved of an elastic package beside its size without a name: three sizes against the slices of the run.

To be run in a process that has seen nothing but the folder (`export.verify`).
"""

from __future__ import annotations

import torch

from export.layouts.elastic import load_size
from export.network_check import TOLERANCE, Claims, NetworkCheck
from export.package_record import ElasticSize
from export.probe import logits_of, next_log_probabilities


def check_sizes(check: NetworkCheck) -> Claims:
    """The claims of every size that the record says something of. Raises `VerificationError` naming the size that is
    another network than the run's slice, or holds more parameters than it has."""
    proved = [size for size in check.entry.sizes if size.proof is not None]
    return {"sizes": {size.name: _check_size(check, size) for size in proved}}


def _check_size(check: NetworkCheck, size: ElasticSize) -> Claims:
    """The claims of one size."""
    assert size.proof is not None
    with check.step(f"loading size {size.name}"):
        model = load_size(check.folder, size.name, torch.float32).eval()
    params = sum(parameter.numel() for parameter in model.parameters())
    if params != size.params:
        raise check.fail(f"size {size.name} has {params} parameters where compression.json says {size.params}")
    with check.step(f"a forward pass of size {size.name}"):
        logits = logits_of(model, check.ids)
    expected = torch.tensor(size.proof.next_logprob, dtype=torch.float64)
    # As in `NetworkCheck.probed`.
    difference = check.largest(
        next_log_probabilities(logits, check.ids) - expected,
        2 * TOLERANCE * size.proof.max_abs_logit + 1e-7,
        f"log-probabilities of size {size.name} are up to {{largest}} off the run's slice, allowed are {{allowed}}",
    )
    with check.step(f"generation with size {size.name}"):
        cached = check.cache(model)
    return {"params": params, "max_abs_logprob_difference": difference, **cached}
