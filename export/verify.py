"""Proof of a package: a fresh process that sees only the folder loads it and checks what it claims.

Nothing of the process that wrote the package is used: weights, code, configuration and tokenizer all come from the
folder, through transformers' Auto classes, offline. The process is `python -m export.verify JOBS RESULTS`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from export.elastic_check import check_sizes
from export.layouts.gguf.runtime import check_gguf
from export.layouts.graphs import check_graph
from export.network_check import OWN, Claims, NetworkCheck, TaskFiles
from export.package_record import check_files, read_record, update_record
from export.shards import weight_bytes
from supernet.common.errors import RequestError, VerificationError
from supernet.common.files import write_json
from supernet.common.processes import fresh_environment, last_line

BEGINS = "proof begins: "
"""How the process tells of a package whose proof begins."""


def verify(
    package: Path, reference: Path | None = None, *, record: bool = False, tasks: TaskFiles | None = None
) -> Claims:
    """What was proved of one package in a fresh process; see `verify_all`."""
    return verify_all([(package, reference)], record=record, tasks=tasks)[0]


def verify_all(
    packages: Sequence[tuple[Path, Path | None]],
    *,
    record: bool = False,
    log: Path | None = None,
    tasks: TaskFiles | None = None,
) -> list[Claims]:
    """What was proved of each package, in order; as `prove_all`, but raises the first refusal once all are checked."""
    claims: list[Claims] = []
    for proof in prove_all(packages, record=record, log=log, tasks=tasks):
        if isinstance(proof, VerificationError):
            raise proof
        claims.append(proof)
    return claims


def prove_all(
    packages: Sequence[tuple[Path, Path | None]],
    *,
    record: bool = False,
    log: Path | None = None,
    tasks: TaskFiles | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Claims | VerificationError]:
    """What was proved of each package, in order, all in one fresh process; of one that is refused, the error that names
    the file or the first claim that does not hold. Where the process dies, a further one goes on behind that package.

    Each comes with the full logits that export saved (`write_package(reference=…)`; the unquantized network's, for a
    quantized package), or None to compare with the compact probe inside the package. With `tasks`, every score that a
    package has in the report is measured again. With `record`, the result is written into each package's
    compression.json. The process's own output goes to `log`; `progress` is told each package whose proof begins.

    Raises `RequestError` where a folder is no package, the runtime that it is for is not installed, or a task cannot be
    read. What was proved before is recorded, also where this is interrupted.
    """
    proofs: list[Claims | VerificationError] = []
    while len(proofs) < len(packages):
        end = _prove(packages[len(proofs) :], proofs, record, tasks, log, progress)
        if len(proofs) < len(packages):
            proofs.append(VerificationError(f"{packages[len(proofs)][0]}: not proved: the checking process {end}"))
    return proofs


def _prove(
    packages: Sequence[tuple[Path, Path | None]],
    proofs: list[Claims | VerificationError],
    record: bool,
    tasks: TaskFiles | None,
    log: Path | None,
    progress: Callable[[str], None],
) -> str:
    """Add to `proofs` what a fresh process finds of the packages, up to where it dies; returns how it ended."""
    with tempfile.TemporaryDirectory(prefix="compressor-verify-") as scratch:
        jobs, results = Path(scratch) / "jobs.json", Path(scratch) / "results.json"
        pairs = [[str(p.resolve()), str(r.resolve()) if r else None] for p, r in packages]
        jobs.write_text(json.dumps({"packages": pairs, "tasks": tasks and asdict(tasks)}), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-m", "export.verify", str(jobs), str(results)],
            env=fresh_environment(Path(scratch), max(weight_bytes(p) for p, _ in packages)),
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            said = _listen(process, progress)
        finally:
            answer = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {"proofs": []}
            found = zip(packages, answer["proofs"], strict=False)
            proofs += [_proof(package, one, record) for (package, _), one in found]
    if log is not None:
        with log.open("a", encoding="utf-8") as stream:
            stream.write(said)
    if "wrong" in answer:
        raise RequestError(answer["wrong"])
    killed = f"was killed (signal {-process.returncode}); too little memory, perhaps" if process.returncode < 0 else ""
    return killed or f"died: {last_line(said)}"


def _proof(package: Path, found: dict[str, Any], record: bool) -> Claims | VerificationError:
    """What the process found of a package, recorded where that is asked for."""
    if (reason := found.get("refused")) is not None:
        if record:  # without the folder's place here: a card may say it
            place = str(package.resolve())
            kept = reason.replace(f"{place}/", "").removeprefix(f"{place}: ")
            update_record(package, entry={"verified": None, "refused": kept})
        return VerificationError(reason)
    claims: Claims = found["claims"]
    own = claims.pop(OWN, None)
    if record:
        update_record(package, entry={"verified": claims, "refused": None}, probe={} if own is None else {OWN: own})
    return claims


def _listen(process: subprocess.Popen[str], progress: Callable[[str], None]) -> str:
    """What the process printed until its end, without what it tells of its progress. It ends with this one."""
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            if line.startswith(BEGINS):
                progress(line.removeprefix(BEGINS).strip())
            else:
                lines.append(line)
    except BaseException:
        process.kill()
        raise
    finally:
        process.stdout.close()
        process.wait()
    return "".join(lines)


def check(package: Path, reference: Path | None = None, tasks: TaskFiles | None = None) -> Claims:
    """What holds of one package, checked in this process (which should be a fresh one). Raises as `verify_all` does."""
    record = read_record(package)
    if record.entry.layout == "gguf":
        return check_gguf(record)
    if record.entry.layout in ("onnx", "openvino"):
        return check_graph(record)
    network = NetworkCheck(record, reference, tasks)
    if record.entry.layout == "elastic":
        return network.run() | check_sizes(network)
    return network.run()


def _main(jobs_file: Path, results_file: Path) -> None:
    """The fresh process: what it found of each package, into `results_file`; the rest where it could not go on."""
    jobs = json.loads(jobs_file.read_text(encoding="utf-8"))
    tasks = None if jobs["tasks"] is None else TaskFiles(**jobs["tasks"])
    pairs = [(Path(package), Path(reference) if reference else None) for package, reference in jobs["packages"]]
    answer: dict[str, Any] = {"proofs": []}
    for package, reference in pairs:
        print(f"{BEGINS}{package.name}", flush=True)
        try:
            check_files(package)  # nothing is loaded of one whose files were changed
            answer["proofs"].append({"claims": check(package, reference, tasks)})
        except VerificationError as error:
            answer["proofs"].append({"refused": str(error)})
        except RequestError as error:
            answer["wrong"] = str(error)
        write_json(results_file, answer)  # each time: a later package may be more than the machine can hold
        if "wrong" in answer:
            break


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
