"""Purified models and adapters to the Hub and back, in one commit each: all of a folder, or nothing of it."""

from __future__ import annotations

import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from .card import CARD_NAME, REPORT_NAME, card_of
from .patience import insist, status_of
from .safety import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    LONGEST_REPORT,
    MODEL_FILES,
    admit,
    check_adapter_config,
    model_sizes,
    read_object,
)
from .text import one_line, without_tokens

_LEFT_BY_CHECKPOINTS = ("training_args.bin", "arguments.json")  # where the Trainer pushed while it trained


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Purified by hf_fip",
    base_model: str | None = None,
) -> str:
    """Push what a purification left to a repository, which is made if there is none.

    The folder itself is not changed. The card that is pushed loads the model from the repository. What the repository
    held of a model before and the folder does not is deleted in the same commit.

    Args:
        folder: with a model or adapter, and the report of its purification.
        repo_id: of the repository; without a `/`, in the namespace of the token's owner.
        token: with the right to write; by default that of `hf auth login` or HF_TOKEN.
        private: whether a repository that is made is private.
        revision: the branch, made if there is none; by default main.
        create_pr: open a pull request in place of a commit.
        message: of the commit.
        base_model: the Hub id of the received model, which an adapter's users need.

    Returns:
        The address of the commit or pull request.

    Raises:
        ValueError: the folder is not whole, or the Hub refused; the message says which and what to do.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = admit(Path(os.path.abspath(folder)))
    files = {
        file.relative_to(folder).as_posix(): file for pattern in MODEL_FILES for file in sorted(folder.glob(pattern))
    }
    contents: dict[str, bytes] = {}
    base = base_model
    if (folder / ADAPTER_CONFIG).is_file():
        config = check_adapter_config(folder)
        received = config.get("base_model_name_or_path")
        if base is None and not read_object(folder / REPORT_NAME, LONGEST_REPORT).get("model_is_from_hub"):
            raise ValueError(
                f"{folder} is an adapter on {one_line(received)}, which others do not have: `hf upload` that model, "
                "then this with --base_model and its id."
            )
        base = base or received
        of_base = {"base_model_name_or_path": base, "revision": config.get("revision") if base == received else None}
        contents[ADAPTER_CONFIG] = json.dumps(config | of_base, indent=2).encode()
    else:
        model_sizes(folder)
    require_token(token)

    def attempt() -> str:
        api = HfApi(token=token)
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/") and not create_pr:
            api.create_branch(full_id, branch=revision, exist_ok=True)
        there = api.model_info(full_id, revision=revision if not create_pr else None)
        contents[CARD_NAME] = str(card_of(folder, full_id, base)).encode()
        names = {entry.rfilename for entry in there.siblings or []}
        ours = (*MODEL_FILES, *_LEFT_BY_CHECKPOINTS)
        stale = [name for name in names - files.keys() if any(fnmatch(name, pattern) for pattern in ours)]
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=contents.get(name, file))
            for name, file in {**files, CARD_NAME: folder / CARD_NAME}.items()
        ]
        operations += [CommitOperationDelete(path_in_repo=name) for name in sorted(stale)]
        commit = api.create_commit(
            full_id,
            operations,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=there.sha,
        )
        return commit.pr_url or commit.commit_url

    try:
        return insist(attempt, unanswered=True)
    except Exception as error:  # of the client, its HTTP library or the network
        status = status_of(error)
        if isinstance(error, ValueError) and status is None:
            raise
        afterwards = f"{folder} is whole as it was; push it again with `hf-fip push {folder} {repo_id}`."
        raise ValueError(f"{_meaning(error, status)} {afterwards}") from error


def require_token(token: str | None) -> None:
    """Raise ValueError when there is no token to write to the Hub with: before hours of work, not after."""
    from huggingface_hub import get_token

    if not token and not get_token():
        raise ValueError("There is no token for the Hub: `hf auth login`, or set HF_TOKEN.")


def pull(repo_id: str, folder: str | os.PathLike, *, revision: str | None = None, token: str | None = None) -> Path:
    """A model or adapter from the Hub as a folder of its own, looked at first and whole or not there.

    Raises:
        ValueError: the repository cannot be had, a file of it is refused, or something is at `folder`.
    """
    final = Path(os.path.abspath(folder))
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"{folder} is there already: choose another --output_dir.")
    if os.path.isdir(repo_id):
        raise ValueError(f"{repo_id} is a folder here, and no repository.")
    try:
        found = admit(repo_id, revision=revision, token=token)
    except ValueError as error:
        raise ValueError(f"{repo_id} cannot be pulled: {error}") from error
    if not any((found / name).is_file() for name in (CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS)):
        raise ValueError(f"{repo_id} holds no model and no adapter.")
    final.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as place:
        partial = Path(place, "pulled")
        for file in sorted({file for pattern in MODEL_FILES for file in found.glob(pattern)}):
            copy = partial / file.relative_to(found)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)  # the file, where the cache has a link to it
        if final.exists():
            final.rmdir()
        os.replace(partial, final)
    return final


def _meaning(error: Exception, status: int | None) -> str:
    meanings = {
        401: "The Hub does not know this token (401): `hf auth login` again.",
        403: "The token may not write there (403): it needs the right to write, and you a place in that namespace.",
        404: "The Hub has no such repository or branch (404), or hides it from this token.",
        409: "Somebody else changes the repository at the same time (409).",
        412: "Somebody else committed meanwhile (412): look at what they changed first.",
        413: "The Hub refuses a file of this size (413).",
    }
    said = without_tokens(one_line(next(iter(str(error).strip().splitlines()), "") or type(error).__name__))
    if status is None:
        return f"The Hub cannot be reached: {said}."
    return meanings.get(status, f"The Hub answered {status}: {said}.")
