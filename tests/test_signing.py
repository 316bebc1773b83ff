"""Signatures by key: what passes, and every kind of tampering that must not. Real keys, real bundles, no network."""

import base64
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from typer.testing import CliRunner

from drank.cli import commands
from drank.project.files import FileError
from drank.project.signing import SigningError, sign, signature_of, verify

signs = pytest.mark.skipif(
    importlib.util.find_spec("model_signing") is None, reason="the extra `sign` is not installed: drank[sign]"
)
FILES = {
    "config.json": b"{}\n",
    "model.safetensors": bytes(range(256)),
    ".gitattributes": b"",
    "sub/tokenizer.json": b"1",
}


def write_keys(folder, name, curve=None):
    key = ec.generate_private_key(curve or ec.SECP256R1())
    write_private(folder / f"{name}.pem", key)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub.pem").write_bytes(public)


def write_private(path, key, password=None):
    protection = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection))


@pytest.fixture
def model(tmp_path):
    for name, content in FILES.items():
        path = tmp_path / "kfac-80" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    write_keys(tmp_path, "key")
    return tmp_path / "kfac-80"


@signs
def test_a_signed_folder_passes_and_nothing_was_added_to_it(model, tmp_path):
    path = sign(model, tmp_path / "key.pem")
    assert path == signature_of(model) == tmp_path / "kfac-80.sig"
    assert {
        file.relative_to(model).as_posix(): file.read_bytes() for file in model.rglob("*") if file.is_file()
    } == FILES
    assert sorted(file.name for file in tmp_path.iterdir()) == ["key.pem", "key.pub.pem", "kfac-80", "kfac-80.sig"]
    assert verify(model, tmp_path / "key.pub.pem") == path


@signs
def test_the_signature_is_a_bundle_that_openssl_checks(model, tmp_path):
    """An independent oracle: DSSE's pre-authentication encoding by hand, the mathematics by the program openssl."""
    envelope = json.loads(sign(model, tmp_path / "key.pem").read_text())["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    (tmp_path / "signed").write_bytes(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload))
    (tmp_path / "bytes").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["openssl", "dgst", "-sha256", "-verify", "key.pub.pem", "-signature", "bytes", "signed"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "Verified OK\n"
    assert {row["name"] for row in json.loads(payload)["predicate"]["resources"]} == set(FILES)


@signs
def test_a_copy_under_another_name_and_through_links_passes(model, tmp_path):
    path = sign(model, tmp_path / "key.pem")
    shutil.copytree(model, tmp_path / "elsewhere/copy")
    linked = tmp_path / "elsewhere/copy/config.json"
    linked.rename(tmp_path / "elsewhere/cached")
    linked.symlink_to("../cached")  # as DVC does where its cache is linked
    assert verify(tmp_path / "elsewhere/copy", tmp_path / "key.pub.pem", path) == path


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def added(path):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")


@signs
@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (lambda m: flip(m / "config.json"), "changed: config.json$"),
        (lambda m: flip(m / "model.safetensors"), "changed: model.safetensors$"),
        (lambda m: flip(m / "sub/tokenizer.json"), "changed: sub/tokenizer.json$"),
        (lambda m: (m / "model.safetensors").write_bytes(b""), "changed: model.safetensors$"),
        (lambda m: added(m / "extra.bin"), "added: extra.bin$"),
        (lambda m: added(m / ".hidden"), "added: .hidden$"),
        (lambda m: added(m / ".git/config"), "added: .git/config$"),
        (lambda m: (m / ".gitattributes").write_bytes(b"* -text"), "changed: .gitattributes$"),
        (lambda m: (m / "config.json").unlink(), "missing: config.json$"),
        (lambda m: (m / "config.json").rename(m / "Config.json"), "missing: config.json; added: Config.json$"),
        (
            lambda m: ((m / "config.json").rename(m / "x"), (m / "model.safetensors").rename(m / "config.json"),
                       (m / "x").rename(m / "model.safetensors")),
            "changed: config.json, model.safetensors$",
        ),
    ],
)  # fmt: skip
def test_a_folder_that_was_tampered_with_fails_and_the_files_are_named(model, tmp_path, tamper, named):
    sign(model, tmp_path / "key.pem")
    tamper(model)
    with pytest.raises(SigningError, match=f"kfac-80: not the files that were signed in .*kfac-80.sig: {named}"):
        verify(model, tmp_path / "key.pub.pem")


def edited(change):
    def edit(path):
        bundle = json.loads(path.read_text())
        change(bundle)
        path.write_text(json.dumps(bundle))

    return edit


def forge(bundle):
    """A statement that suits another folder, under the signature of this one."""
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    statement["predicate"]["resources"].pop()
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()


def no_hint(bundle):
    bundle["verificationMaterial"]["publicKey"] = {}
    forge(bundle)


@signs
@pytest.mark.parametrize(
    ("tamper", "error", "message"),
    [
        (lambda p: p.write_text(p.read_text()[:-40]), FileError, "kfac-80.sig: damaged, not JSON"),
        (
            lambda p: p.write_text("{}"),
            SigningError,
            "kfac-80.sig: damaged, no signature of a folder .KeyError.; fetch it again",
        ),
        (lambda p: p.write_text("[]"), SigningError, "kfac-80.sig: damaged, no signature of a folder"),
        (
            edited(lambda b: b.update(mediaType="x")),
            SigningError,
            "damaged, no signature of a folder .ValidationError.",
        ),
        (edited(lambda b: b["dsseEnvelope"].update(signatures=[])), SigningError, "damaged, no signature of a folder"),
        (edited(lambda b: b["dsseEnvelope"].pop("payload")), SigningError, "damaged, no signature of a folder"),
        (edited(forge), SigningError, "kfac-80.sig: edited or damaged: its statement is not what .*key.pub.pem has"),
        (edited(no_hint), SigningError, "kfac-80.sig: edited or damaged: its statement is not what .*key.pub.pem has"),
        (
            edited(lambda b: b["dsseEnvelope"]["signatures"][0].update(sig=base64.b64encode(b"x" * 70).decode())),
            SigningError,
            "edited or damaged",
        ),
        (lambda p: p.unlink(), SigningError, "kfac-80.sig: no signature there; --signature says where it is"),
    ],
)
def test_a_damaged_or_forged_signature_fails(model, tmp_path, tamper, error, message):
    tamper(sign(model, tmp_path / "key.pem"))
    with pytest.raises(error, match=message):
        verify(model, tmp_path / "key.pub.pem")


@signs
def test_another_key_fails(model, tmp_path):
    write_keys(tmp_path, "other")
    sign(model, tmp_path / "key.pem")
    with pytest.raises(
        SigningError, match="kfac-80.sig: made with another key than the private one of .*other.pub.pem"
    ):
        verify(model, tmp_path / "other.pub.pem")
    sign(model, tmp_path / "other.pem")
    assert verify(model, tmp_path / "other.pub.pem")


@signs
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda p: p.unlink(),
            "key.pem: cannot be read .No such file or directory.; needed is a private key .* openssl",
        ),
        (lambda p: p.write_text("no key"), "key.pem: not a usable key .*openssl ecparam -name prime256v1"),
        (lambda p: write_private(p, ec.generate_private_key(ec.SECP256R1()), b"word"), "without password"),
        (lambda p: write_private(p, ec.generate_private_key(ec.SECP256K1())), "Unsupported key for curve 'secp256k1'"),
        (lambda p: write_private(p, rsa.generate_private_key(65537, 2048)), "key.pem: not a usable key"),
    ],
)
def test_a_key_that_cannot_sign_is_refused_with_the_way_to_make_one(model, tmp_path, write, message):
    write(tmp_path / "key.pem")
    with pytest.raises(SigningError, match=message):
        sign(model, tmp_path / "key.pem")
    assert not signature_of(model).exists()


@signs
def test_the_private_key_is_no_public_one(model, tmp_path):
    sign(model, tmp_path / "key.pem")
    with pytest.raises(SigningError, match="key.pem: not a usable key .*the public key of the pair: openssl ec -in"):
        verify(model, tmp_path / "key.pem")


def test_what_cannot_be_signed_is_refused(model, tmp_path):
    with pytest.raises(SigningError, match="nowhere: no folder; name the folder of a model"):
        sign(tmp_path / "nowhere", tmp_path / "key.pem")
    with pytest.raises(SigningError, match="would change what it signs; put it outside"):
        sign(model, tmp_path / "key.pem", model / "kfac-80.sig")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SigningError, match="empty: an empty folder has nothing to sign"):
        sign(tmp_path / "empty", tmp_path / "key.pem")


@signs
def test_the_commands_sign_and_verify(model, tmp_path):
    run = CliRunner().invoke
    signed = run(commands, ["sign", str(model), "--private-key", str(tmp_path / "key.pem")])
    assert (signed.exit_code, signed.stdout) == (0, f"{model}: signed in {model}.sig\n")
    verified = run(commands, ["verify", str(model), "--public-key", str(tmp_path / "key.pub.pem")])
    assert (verified.exit_code, verified.stdout) == (0, f"{model}: the files that were signed in {model}.sig\n")
    flip(model / "config.json")
    failed = run(commands, ["verify", str(model), "--public-key", str(tmp_path / "key.pub.pem")])
    assert isinstance(failed.exception, SigningError)  # which `drank` itself turns into a message and exit status 1


def test_without_the_extra_the_message_is_how_to_install_it(model, tmp_path):
    program = (
        "import sys; sys.modules['model_signing'] = None\n"  # an import of it now fails as if it were not installed
        "from drank.cli import app\n"
        f"sys.argv = ['drank', 'sign', {str(model)!r}, '--private-key', {str(tmp_path / 'key.pem')!r}]\napp()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: signatures need model_signing: pip install 'drank[sign]'\n"
