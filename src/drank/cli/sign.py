"""``drank sign`` and ``drank verify``: who vouches for a model folder, by key and without a network."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="The folder of a model.")]
Signature = Annotated[
    Path | None, typer.Option(help="The signature, outside the folder; by default MODEL_DIR.sig.", dir_okay=False)
]


def sign(
    model: Model,
    private_key: Annotated[Path, typer.Option(help="PEM file of an elliptic-curve key (prime256v1), no password.")],
    signature: Signature = None,
) -> None:
    """Sign every file of a model folder (needs the extra `sign`).

    Make a pair of keys with

    openssl ecparam -name prime256v1 -genkey -noout -out key.pem

    openssl ec -in key.pem -pubout -out key.pub.pem
    """
    from drank.project import signing

    typer.echo(f"{model}: signed in {signing.sign(model, private_key, signature)}")


def verify(
    model: Model,
    public_key: Annotated[Path, typer.Option(help="PEM file of the public key of the pair.")],
    signature: Signature = None,
) -> None:
    """Check a model folder against its signature: no file changed, missing or added (needs the extra `sign`).

    It says whether these are the files that the holder of the key signed. What made them is asked of `drank audit`.
    """
    from drank.project import signing

    typer.echo(f"{model}: the files that were signed in {signing.verify(model, public_key, signature)}")
