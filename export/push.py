"""Upload a verified package to the hub.

`huggingface_hub` does the work: one commit, files that are there already are not sent again, so a broken upload is
resumed by running the command again. No token is kept or printed, also where what answers repeats it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from export.package import NAMED_TEMPLATES, TOKENIZER_FILES
from export.package_record import CARD, RECORD, PackageRecord, check_files, read_record, write_card
from export.shards import WEIGHT_FILES
from supernet.common.errors import RequestError, first_line
from supernet.common.formatting import size
from supernet.common.progress import say

REPLACED = [*WEIGHT_FILES, "*.py", "*.index.json", "*.bin", "export.json", "config.json", "generation_config.json"]
REPLACED += ["elastic.json", "Modelfile", *TOKENIZER_FILES, f"{NAMED_TEMPLATES}/*"]
"""Files of an earlier package that are deleted from the repository where this one has none of the name."""


def push(package: Path, repo_id: str, *, private: bool = False, dry_run: bool = False) -> dict[str, object]:
    """Upload the package's recorded files (and nothing else of the folder) to `repo_id`, in one commit.

    Returns `repo`, `url`, `private`, `bytes`, `files` (name and bytes each), and `commit`. A dry run checks the package
    and lists the files, but asks no server: `url` and `commit` are None.

    Raises `RequestError` where the package is not verified, nobody is logged in, the hub refuses, or the repository
    holds something else, and `VerificationError` where the files are not what was written.
    """
    _check_name(repo_id)
    if not dry_run:
        _check_login()
    record = read_record(package)
    if record.entry.refused:
        raise RequestError(f"{package}: refused by its proof, and so not to be published: {record.entry.refused}")
    if not record.entry.verified:
        raise RequestError(f"{package}: not verified, and so not to be published; export it again")
    check_files(package)
    sizes = {name: (package / name).stat().st_size for name in (RECORD, *record.files)}
    total = sum(sizes.values())
    for name, bytes_ in sizes.items():
        say(f"{size(bytes_):>10}  {name}")
    url = commit = None
    if dry_run:
        say(f"{size(total):>10}  in all would go to {repo_id}; nothing was uploaded")
    else:
        say(f"uploading {size(total)} to {repo_id}")
        with _under_its_name(record, repo_id) as folder:
            url, commit = _upload(folder, repo_id, list(sizes), private)
        say(f"{url} is at commit {commit}")
    return {
        "repo": repo_id,
        "private": private,
        "files": [{"name": name, "bytes": bytes_} for name, bytes_ in sizes.items()],
        "bytes": total,
        "url": url,
        "commit": commit,
    }


@contextmanager
def _under_its_name(record: PackageRecord, repo_id: str) -> Iterator[Path]:
    """Within, a folder of links to the package's files whose card has its name on the hub in the place of a path."""
    local, card = f"path/to/{record.entry.name}", record.folder / CARD
    if not card.is_file() or local not in (text := card.read_text(encoding="utf-8")):
        yield record.folder
        return
    with tempfile.TemporaryDirectory(prefix="compressor-push-") as name:
        folder = Path(name) / record.folder.name
        for file in record.files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if file != CARD:
                (folder / file).symlink_to((record.folder / file).resolve())
        shutil.copyfile(record.folder / RECORD, folder / RECORD)
        write_card(folder, text.replace(local, repo_id))
        yield folder


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RequestError(f"'{repo_id}' is no name of a repository: {first_line(error)}") from None
    if "/" not in repo_id:
        raise RequestError(f"'{repo_id}' names no owner: write OWNER/{repo_id}")


def _check_login() -> None:
    if get_token() is None:
        raise RequestError(
            "not logged in to the hub: run `hf auth login`, or set HF_TOKEN to a token that may write; "
            "--dry-run needs neither"
        )


def _upload(package: Path, repo_id: str, names: list[str], private: bool) -> tuple[str, str]:
    """Create the repository where there is none, and commit the files. Returns its address and the commit."""
    api = HfApi()
    # The base of all errors of the HTTP library, which is requests or httpx depending on huggingface_hub's version.
    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        if private and api.repo_info(repo.repo_id).private is False:  # one that is there stays as it is
            raise RequestError(
                f"{repo_id}: the repository is public; make it private on the hub, or choose another name"
            )
        present = set(api.list_repo_files(repo.repo_id)) - {".gitattributes"}
        if present and RECORD not in present:
            raise RequestError(f"{repo_id}: the repository holds something else ({min(present)}); choose another name")
        commit = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=package,
            commit_message=f"Upload {package.name} with nas-compressor",
            allow_patterns=names,
            delete_patterns=REPLACED,
        )
    except OfflineModeIsEnabled:
        raise RequestError("HF_HUB_OFFLINE is set: unset it to reach the hub") from None
    except HfHubHTTPError as error:
        raise _without_token(_refusal(repo_id, error)) from None
    except transport_error as error:
        reason = (str(error) or type(error).__name__).rstrip(".")
        hint = "run the command again to resume"
        raise _without_token(f"cannot reach the hub at {api.endpoint}: {reason}; {hint}") from None
    except RuntimeError as error:  # huggingface_hub wraps the failure of one file so
        cause = error.__cause__
        if not isinstance(cause, transport_error):
            raise
        raise _without_token(f"{error} ({first_line(cause)}); run the command again to resume") from None
    except ValueError as error:  # no JSON, or addresses of another host: a proxy, a login page, a mirror
        reason = f"{type(error).__name__}: {first_line(error).rstrip('.')}"
        raise _without_token(
            f"what answers at {api.endpoint} does not speak as a hub does ({reason}); is it a proxy or a login page?"
        ) from None
    return str(repo), commit.oid


def _without_token(line: str) -> RequestError:
    """The error that says this line, without the token where a server repeated it."""
    token = get_token()
    return RequestError(line.replace(token, "(the token)") if token else line)


def _refusal(repo_id: str, error: HfHubHTTPError) -> str:
    """What the hub answered, and what to do about it, in one line."""
    status = error.response.status_code if error.response is not None else None
    reason = (error.server_message or first_line(error)).rstrip(".")
    if status == 401:
        return f"the hub does not know the token: {reason}; run `hf auth login` again, or renew HF_TOKEN"
    if status == 403:
        return f"the token may not write to {repo_id}: {reason}; use one with write access to that namespace"
    again = "; somebody wrote to it meanwhile: run the command again" if status == 412 else ""
    return f"the hub refused the upload to {repo_id} (status {status}): {reason}{again}"
