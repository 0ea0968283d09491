"""Get a model's files from the Hugging Face Hub, or list the models known by name.

Takes what converting needs and nothing else: the configs, the tokenizer, and the weights in one format. A download
that was cut off goes on where it stopped. A model that is not listed works too where its architecture is supported.

    python scripts/download.py                                                    # lists the known models
    python scripts/download.py --repo_id meta-llama/Llama-2-7b-hf --from_safetensors true --access_token=<HF_TOKEN>
"""

import difflib
import errno
import fnmatch
import json
import os
import socket
import ssl
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.cli import Secret, main
from lit_gpt.config import KNOWN_MODELS, check_unquantized
from lit_gpt.errors import UserError, command

WEIGHTS = {True: "model*.safetensors", False: "pytorch_model*.bin"}
SIDE_FILES = (".json", ".model", ".jinja", "merges.txt")


def setup(
    *,
    repo_id: str | None = None,
    from_safetensors: bool | None = None,
    access_token: Secret | None = None,
    checkpoint_dir: Path = Path("checkpoints"),
    revision: str | None = None,
) -> None:
    """Download a model from the Hugging Face Hub; without --repo_id, list the known models.

    Args:
        repo_id: the model's name on the Hub, ORG/NAME.
        from_safetensors: take .safetensors (true) or .bin files (false); .safetensors where there are any by default.
        access_token: for models that ask for a licence; read from HF_TOKEN when not given.
        checkpoint_dir: the folder that gets ORG/NAME.
        revision: a branch, tag or commit other than main.
    """
    if repo_id is None:
        print("\n".join(KNOWN_MODELS))
        return
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise UserError(f"--repo_id {repo_id} is not of the form ORG/NAME{nearest(repo_id)}")
    folder = checkpoint_dir / repo_id
    token = access_token.get_secret_value() if access_token is not None else os.environ.get("HF_TOKEN", "")
    token = token.strip()  # secret files end with a newline
    if not (token.isascii() and token.isprintable()):
        raise UserError("the access token holds characters that no token has; copy it again")
    fetch(repo_id, folder, from_safetensors=from_safetensors, token=token or None, revision=revision)
    print(f"{repo_id} -> {folder}")
    print(f"next: {command('scripts/convert_hf_checkpoint.py', checkpoint_dir=folder)}")


def nearest(repo_id: str) -> str:
    """Return the known names that look like ``repo_id``, as the end of a message."""
    lowered = {name.lower(): name for name in KNOWN_MODELS}
    found = difflib.get_close_matches(repo_id.lower(), lowered, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(lowered[name] for name in found)}?" if found else ""


def wanted_files(names: list[str], repo_id: str, *, from_safetensors: bool | None) -> list[str]:
    """Return the files of a repo to download: its top level's configs, tokenizer and weights in one format.

    Raises:
        ValueError: the repo has no weights, or none in the format asked for.
    """
    names = [name for name in names if "/" not in name]
    have = {kind: fnmatch.filter(names, pattern) for kind, pattern in WEIGHTS.items()}
    kind = bool(have[True]) if from_safetensors is None else from_safetensors
    if not have[kind]:
        other = f"; it has .{'bin' if kind else 'safetensors'} files: --from_safetensors {str(not kind).lower()}"
        other = other if have[not kind] else ", so nothing that can be converted"
        raise UserError(f"{repo_id} has no {WEIGHTS[kind]}{other}")
    return have[kind] + [name for name in names if name.endswith(SIDE_FILES)]


def refuse_quantized(repo_id: str, **options: Any) -> None:
    """Raise where the repo's config.json, which is fetched alone and not kept, says that its weights are quantized."""
    from huggingface_hub import hf_hub_download

    with tempfile.TemporaryDirectory() as folder:
        text = Path(hf_hub_download(repo_id, "config.json", local_dir=folder, **options)).read_bytes()
    try:
        described = json.loads(text)
    except ValueError:
        return  # for the converter to say
    check_unquantized(described, repo_id)


def fetch(repo_id: str, folder: Path, *, from_safetensors: bool | None, **options: Any) -> None:
    """Download a repo's files into ``folder``.

    Args:
        repo_id: ORG/NAME.
        folder: where they go.
        from_safetensors: which format, None for whichever there is.
        options: ``token`` and ``revision``, as huggingface_hub takes them.

    Raises:
        OSError, ValueError: one line on what went wrong and what to do.
    """
    from huggingface_hub import HfApi, snapshot_download

    # huggingface_hub's HTTP library changes with its version; its connection errors are not OSErrors.
    libraries = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    failures = (OSError, RuntimeError, *(library.TransportError for library in libraries))
    try:
        names = [file.rfilename for file in HfApi().model_info(repo_id, timeout=30, **options).siblings or []]
        if "config.json" in names:
            refuse_quantized(repo_id, **options)
        files = wanted_files(names, repo_id, from_safetensors=from_safetensors)
        snapshot_download(repo_id, local_dir=folder, allow_patterns=files, **options)
    except failures as error:
        raise OSError(explanation(error, repo_id, folder, **options)) from error


def explanation(error: Exception, repo_id: str, folder: Path, *, token: str | None, revision: str | None) -> str:
    """Return one line on what went wrong and what to do."""
    from huggingface_hub import errors

    network = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
    unreachable = (None, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)
    again, kept = "run the command again", "(what is complete is kept)"
    if isinstance(error, OSError) and not isinstance(error, network) and error.errno not in unreachable:
        return (
            f"cannot write {error.filename or folder}: {error.strerror}; clear that up, or choose another "
            f"--checkpoint_dir, and {again} {kept}"
        )
    access = "your token has no access" if token else "give --access_token=<HF_TOKEN> or set HF_TOKEN"
    private = "" if token else " (or it is private: give --access_token=<HF_TOKEN>)"
    status = getattr(getattr(error, "response", None), "status_code", "no answer")
    reason = "the access token is not valid, or may not read this" if status in (401, 403) else "try again later"
    by_hand = (
        f"or copy the files of {os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{repo_id} into {folder} by "
        f"hand and go on with: {command('scripts/convert_hf_checkpoint.py', checkpoint_dir=folder)}"
    )
    lines = {
        errors.GatedRepoError: f"{repo_id} is gated: accept its licence on its page on the Hub; {access}",
        errors.RepositoryNotFoundError: f"{repo_id} was not found on the Hub{private}{nearest(repo_id)}",
        errors.RevisionNotFoundError: f"{repo_id} has no revision {revision}",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, so the Hub is not asked: unset it",
        errors.HfHubHTTPError: f"the Hub refused {repo_id} (HTTP {status}): {reason}",
        # hf_xet's, which moves large files in chunks.
        RuntimeError: f"the transfer failed ({' '.join(str(error).split())}): {again} with HF_HUB_DISABLE_XET=1 {kept}",
        Exception: f"the Hub could not be reached ({type(error).__name__}): check the network and {again} {kept}",
    }
    line = next(line for kind, line in lines.items() if isinstance(error, kind))
    told_by_the_hub = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    return line if isinstance(error, told_by_the_hub) else f"{line}, {by_hand}"


if __name__ == "__main__":
    main(setup)
