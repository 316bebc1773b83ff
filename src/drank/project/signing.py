"""Signatures of model folders by key, with OpenSSF model-signing: a Sigstore bundle beside the folder, no network.

The bundle holds an in-toto statement with the SHA-256 of every file, signed by ECDSA. Nothing is added to the folder,
which is an output of DVC and has a hash of its own.

A pair of keys::

    openssl ecparam -name prime256v1 -genkey -noout -out key.pem
    openssl ec -in key.pem -pubout -out key.pub.pem
"""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drank.project.files import check_plain, read_json, scratch_folder, write_text

if TYPE_CHECKING:
    from model_signing.hashing import Config as Hashing

MAKE_KEY = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
MAKE_PUBLIC_KEY = "openssl ec -in key.pem -pubout -out key.pub.pem"
# What the library lets through of what others may have written into a key or a signature.
MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError)


class SigningError(ValueError):
    """A folder cannot be signed, or is not what was signed; the message says which file and why."""


def signature_of(model: Path) -> Path:
    """Where a folder's signature is by default: beside it, <folder>.sig."""
    folder = model.resolve()
    return folder.with_name(f"{folder.name}.sig")


def sign(model: Path, private_key: Path, signature: Path | None = None) -> Path:
    """Sign every file of a folder with a private key; returns the path of the signature.

    ECDSA draws a random number, so that no two signatures are the same bytes.

    Raises:
        SigningError: no folder, no usable key, a signature that would change the folder, or model-signing is missing.
        FileError: the folder holds what is no file.
    """
    _check_folder(model)
    path = signature or signature_of(model)
    if path.resolve().is_relative_to(model.resolve()):
        raise SigningError(f"{path}: a signature inside {model} would change what it signs; put it outside")
    library = _library()
    with _usable(private_key, f"a private key on the curve prime256v1, without password: {MAKE_KEY}"):
        config = library.signing.Config().use_elliptic_key_signer(private_key=private_key)
    with scratch_folder(path.with_name(f".{path.name}.scratch")) as scratch:
        config.set_hashing_config(_every_file()).sign(model, scratch / "bundle")
        write_text(path, (scratch / "bundle").read_text(encoding="utf-8") + "\n")
    return path


def verify(model: Path, public_key: Path, signature: Path | None = None) -> Path:
    """Check that a folder holds the files that were signed, no more and no less; returns the path of the signature.

    Raises:
        SigningError: it does not, the signature is missing, damaged or of another key, or model-signing is missing.
        FileError: the signature is no JSON, or the folder holds what is no file.
    """
    _check_folder(model)
    path = signature or signature_of(model)
    if not path.is_file():
        raise SigningError(f"{path}: no signature there; --signature says where it is, `drank sign` makes one")
    library = _library()
    from cryptography.exceptions import InvalidSignature

    with _usable(public_key, f"the public key of the pair: {MAKE_PUBLIC_KEY}"):
        config = library.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    bundle = read_json(path)
    try:
        config.set_hashing_config(_every_file()).verify(model, path)
    except InvalidSignature:
        raise SigningError(f"{path}: edited or damaged: its statement is not what {public_key} has signed") from None
    except MALFORMED as error:
        if str(error).startswith("Signature mismatch"):  # the statement is genuine, the folder is another
            raise SigningError(
                f"{model}: not the files that were signed in {path}: {_differing(bundle, model)}"
            ) from None
        if str(error).startswith("Key mismatch"):
            raise SigningError(f"{path}: made with another key than the private one of {public_key}") from None
        raise SigningError(
            f"{path}: damaged, no signature of a folder ({type(error).__name__}); fetch it again"
        ) from None
    return path


def _differing(bundle: Any, model: Path) -> str:
    """Files that are not those of the statement in a bundle, by what happened to them."""
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    signed = {row["name"]: row["digest"] for row in statement["predicate"]["resources"]}
    found = {row.identifier: row.digest.digest_hex for row in _every_file().hash(model).resource_descriptors()}
    names = {
        "changed": sorted(name for name in signed.keys() & found.keys() if signed[name] != found[name]),
        "missing": sorted(signed.keys() - found.keys()),
        "added": sorted(found.keys() - signed.keys()),
    }
    return "; ".join(f"{what}: {', '.join(listed)}" for what, listed in names.items() if listed)


def _library() -> Any:
    try:
        import model_signing
    except ModuleNotFoundError as error:
        raise SigningError(f"signatures need {error.name}: pip install 'drank[sign]'") from None
    return model_signing


def _every_file() -> "Hashing":
    """SHA-256 of each file. By default the library passes over files of git, through links not at all."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False).set_allow_symlinks(True)


def _check_folder(model: Path) -> None:
    if not model.is_dir():
        raise SigningError(f"{model}: no folder; name the folder of a model, such as data/models/kfac-80")
    if not any(file.is_file() for file in model.rglob("*")):
        raise SigningError(f"{model}: an empty folder has nothing to sign")
    check_plain(model)


@contextmanager
def _usable(key: Path, needed: str) -> Iterator[None]:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        yield
    except OSError as error:
        raise SigningError(f"{key}: cannot be read ({error.strerror}); needed is {needed}") from None
    except (*MALFORMED, UnsupportedAlgorithm) as error:
        raise SigningError(f"{key}: not a usable key ({error}); needed is {needed}") from None
