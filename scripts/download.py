"""Get a model's files from the Hugging Face Hub, or list the models known by name.

Takes what converting needs and nothing else: the configs, the tokenizer, and the weights in one format. A model that
is not listed works too where its architecture is supported; where not, that is said before the weights are fetched. A
download that was cut off, or killed, goes on where it stopped: huggingface_hub 2 drops what it has of a file, so the
weights, one after the other, are appended to a part file here, and huggingface_hub checks their hashes.

    python scripts/download.py                                                    # lists the known models
    python scripts/download.py --repo_id meta-llama/Llama-2-7b-hf --from_safetensors true --access_token=<HF_TOKEN>
"""

import fnmatch
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from lit_gpt.cli import Secret, main, one_line
from lit_gpt.config import KNOWN_MODELS, check_supported
from lit_gpt.errors import UserError, command, reading
from lit_gpt.files import TEMPORARY, Progress
from lit_gpt.tokenizer_files import NAMES

LISTED = "`python scripts/download.py` lists the known models"
WEIGHTS = {True: "model*.safetensors", False: "pytorch_model*.bin"}


def setup(
    *, repo_id: str | None = None, from_safetensors: bool | None = None, access_token: Secret | None = None,
    checkpoint_dir: Path = Path("checkpoints"), revision: str | None = None, tokenizer_only: bool = False,
) -> None:  # fmt: skip
    """Download a model from the Hugging Face Hub; without --repo_id, list the known models.

    Args:
        repo_id: the model's name on the Hub, ORG/NAME.
        from_safetensors: take .safetensors (true) or .bin files (false); .safetensors where there are any by default.
        access_token: for models that ask for a licence; read from HF_TOKEN when not given.
        checkpoint_dir: the folder that gets ORG/NAME.
        revision: a branch, tag or commit other than main.
        tokenizer_only: leave the weights out.
    """
    if repo_id is None:
        print("\n".join(KNOWN_MODELS))
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UserError(f"--repo_id {repo_id} is not of the form ORG/NAME; {LISTED}")
    folder = checkpoint_dir / repo_id
    token = access_token.get_secret_value() if access_token is not None else os.environ.get("HF_TOKEN", "")
    token = token.strip()  # secret files end with a newline
    if not (token.isascii() and token.isprintable()):
        raise UserError("the access token holds characters that no token has; copy it again")
    which = {"from_safetensors": from_safetensors, "tokenizer_only": tokenizer_only}
    fetch(repo_id, folder, token=token or None, revision=revision, **which)
    print(f"{repo_id} -> {folder}")
    if not tokenizer_only:
        print(f"next: {command('scripts/convert_hf_checkpoint.py', checkpoint_dir=folder)}")


def wanted_files(names: list[str], repo_id: str, *, from_safetensors: bool | None, tokenizer_only: bool) -> list[str]:
    """Return the files of a repo to download: its top level's configs, tokenizer and weights in one format.

    Raises:
        ValueError: the repo has no weights, or none in the format asked for.
    """
    names = [name for name in names if "/" not in name]
    beside = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in NAMES)]
    if tokenizer_only:
        return beside
    have = {kind: fnmatch.filter(names, pattern) for kind, pattern in WEIGHTS.items()}
    kind = bool(have[True]) if from_safetensors is None else from_safetensors
    if not have[kind]:
        other = ", so nothing that can be converted"
        if fnmatch.filter(names, "*.gguf"):
            other = "; copy one of its .gguf files by hand, for scripts/convert_gguf_checkpoint.py"
        if have[not kind]:
            other = f"; it has .{'bin' if kind else 'safetensors'} files: --from_safetensors {str(not kind).lower()}"
        raise UserError(f"{repo_id} has no {WEIGHTS[kind]}{other}")
    if "config.json" not in names:
        raise UserError(f"{repo_id} has no config.json, so no model that can be converted")
    whole = WEIGHTS[kind].replace("*", "")  # what is read, also where there are shards too
    return beside + ([whole] if whole in names else have[kind] + fnmatch.filter(names, f"{whole}.index.json"))


def fetch(repo_id: str, folder: Path, *, token: str | None, revision: str | None, **which: Any) -> None:
    """Download a repo's files into ``folder``.

    Args:
        repo_id: ORG/NAME.
        folder: where they go.
        token: for the Hub.
        revision: as huggingface_hub takes it.
        which: the options of ``wanted_files``.

    Raises:
        OSError, ValueError: one line on what went wrong and what to do.
    """
    from huggingface_hub import HfApi, errors, hf_hub_download, hf_hub_url, snapshot_download

    # huggingface_hub's HTTP library changes with its version; its connection errors are not OSErrors.
    transport = [sys.modules[name].TransportError for name in ("httpx", "httpx2") if name in sys.modules]
    try:
        info = HfApi().model_info(repo_id, timeout=30, files_metadata=True, token=token, revision=revision)
        here = {"token": token, "revision": info.sha}  # all files of one commit
        files = {file.rfilename: file for file in info.siblings or []}
        names = wanted_files([*files], repo_id, **which)
        if not which["tokenizer_only"]:
            origins = [tag.rpartition(":")[2] for tag in info.tags or [] if tag.startswith("base_model:quantized:")]
            with tempfile.TemporaryDirectory() as aside:  # fetched alone: what cannot be converted leaves nothing
                described = Path(hf_hub_download(repo_id, "config.json", local_dir=aside, **here)).read_bytes()
            with reading(f"config.json of {repo_id}"):
                check_supported(json.loads(described), " made of ".join([repo_id, *origins]))
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            if files[name].lfs and not (folder / name).exists():
                fetch_rest(files[name], folder, hf_hub_url(repo_id, name, revision=info.sha), token)
        snapshot_download(repo_id, local_dir=folder, allow_patterns=names, **here)
    except (OSError, RuntimeError, errors.HFValidationError, json.JSONDecodeError, *transport) as error:
        if getattr(error, "errno", None):  # the disk's or the network's, which says all by itself
            raise
        raise OSError(explanation(error, repo_id, folder)) from error


def fetch_rest(file: Any, folder: Path, url: str, token: str | None) -> None:
    """Append what is missing of a large file to the part that an earlier download left, and rename it when complete."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part, headers = folder / f"{TEMPORARY}{file.rfilename}.{file.lfs.sha256}", build_hf_headers(token=token)
    with part.open("ab") as target:
        done = target.tell()
        with Progress(desc=file.rfilename, total=file.size, initial=done, unit="B") as bar:
            http_get(url, target, resume_size=done, headers=headers, expected_size=file.size, _tqdm_bar=bar)
    part.replace(folder / file.rfilename)


def explanation(error: Exception, repo_id: str, folder: Path) -> str:
    """Return one line on what went wrong, mostly in huggingface_hub's words, and what to do."""
    from huggingface_hub import errors

    access = "--access_token=<HF_TOKEN> or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id} is gated: accept its licence on its page on the Hub, and give your account's {access}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repo_id} was not found on the Hub (or it is private: give {access}); {LISTED}"
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    xet = "set HF_HUB_DISABLE_XET=1, or " * isinstance(error, RuntimeError)  # of the library for chunked transfers
    return (
        f"{repo_id} cannot be had from {hub} ({type(error).__name__}: {one_line(error)}): {xet}clear that up and run "
        f"the command again (what is there is kept), or copy the files into {folder} by hand and go on with: "
        + command("scripts/convert_hf_checkpoint.py", checkpoint_dir=folder)
    )


if __name__ == "__main__":
    main(setup)
