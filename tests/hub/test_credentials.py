"""Credentials: every shape is found wherever it stands, what a run writes is none, and no file of a run holds one.

No line of this file is shaped like a credential: they are put together when the tests run.
"""

import hashlib
import json
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest

from bmtk.hub.bundle import PublishError, holds_token
from bmtk.hub.credentials import holds_credential, redact_settings, without_credentials
from bmtk.hub.redaction import scrub_text

BODY = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7cF0xR6uL3"  # 36 characters
SHAPES = {
    "access": "hf_" + BODY[:34],
    "oauth": "hf_" + f"oauth_{BODY}",
    "jwt": "hf_" + f"jwt_eyJhbGciOi.{BODY}.{BODY}",
    "organization": "api_" + f"org_{BODY[:34]}",
    **{f"GitHub {letter}": f"gh{letter}" + f"_{BODY}" for letter in "posur"},
    "GitHub, fine-grained": "github_" + f"pat_{BODY[:22]}_{BODY}",
    "GitLab": "glpat" + f"-{BODY[:20]}",
    "OpenAI": "sk" + f"-{BODY}{BODY[:12]}",
    "OpenAI, project": "sk" + f"-proj-{BODY[:10]}-{BODY}_{BODY}",
    "Anthropic": "sk" + f"-ant-api03-{BODY}-{BODY}",
    "AWS": "AKI" + "AIOSFODNN7EXAMPLE",
    "AWS, for a time": "ASI" + "AIOSFODNN7EXAMPLE",
    "Google": "AIz" + f"a{BODY[:35]}",
    "Slack": "xox" + "b-123456789012-1234567890123-aB3dE6gH9jK2",
    "Stripe": "sk_" + f"live_{BODY[:24]}",
    "npm": "npm" + f"_{BODY}",
    "PyPI": "pyp" + f"i-AgEIcHlwaS5vcmc{BODY}",
    "Replicate": "r8" + f"_{BODY}",
    "JSON Web Token": "eyJ" + f"hbGciOiJI.eyJ{BODY}.{BODY}",
    "private key": "-----BEGIN "
    + "OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1r\nZXktdjE=\n-----END OPENSSH PRIVATE KEY-----",
    "private key in JSON": "-----BEGIN " + r"RSA PRIVATE KEY-----\nb3BlbnNzaC1r\n-----END RSA PRIVATE KEY-----",
    "header of a key": "-----BEGIN " + "PRIVATE KEY-----",
}
PLACES = (
    "{}",
    "key={}",
    '"{}"',
    "x_{}",
    "https://example.org/{}",
    "text {}, more",
    "--hub_token {}",
    "\n{}\n",
    "é{}ü",
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", PLACES)
def test_every_shape_is_found_and_redacted_wherever_it_stands(shape, place):
    text = place.format(SHAPES[shape])
    assert holds_credential(text.encode())
    for redacted in (without_credentials(text), scrub_text(text)):
        assert BODY[:10] not in redacted
        assert "b3BlbnNzaC1r" not in redacted
        assert "IOSFODNN7EXAMPLE" not in redacted
        assert not holds_credential(redacted.encode())


def test_what_a_run_writes_is_no_credential():
    noise = np.random.default_rng(0).bytes(1 << 20)
    words = "sk-learn hf_hub_download sk-internationalization-of-x task-a1b2c3d4e5f6a7b8c9d0 AKIA AIza npm_config"
    texts = [hashlib.sha256(bytes([i])).hexdigest() for i in range(200)]
    texts += [hashlib.sha1(bytes([i])).hexdigest() for i in range(200)]
    texts += [b64encode(noise).decode(), noise.hex(), words, "BEGIN PUBLIC KEY", "2026-11-29T05:11:36+00:00", "1e-05"]
    text = json.dumps(texts)
    assert without_credentials(text) == text
    assert not holds_credential(text.encode())
    assert not holds_credential(noise)


def test_the_project_itself_holds_none():
    root = Path(__file__).parents[2]
    files = [*root.glob("bmtk/**/*.py"), *root.glob("recipes/**/*.yaml"), *root.glob("tests/**/*.py")]
    assert len(files) > 100
    assert not [path for path in files if holds_credential(path.read_bytes())]


def test_values_of_this_process_are_found_whatever_their_shape(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "plain-words")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    monkeypatch.setenv("DB_PASSWORD", "short")  # could be a word of any text
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "a value that is no secret")
    text = "plain-words 0123456789abcdef0123 short a value that is no secret"
    assert without_credentials(text) == "[redacted] [redacted] short a value that is no secret"
    path = tmp_path / "run.json"
    path.write_bytes(b"\x00\xff" + "plain-words".encode("utf-16-le"))
    assert holds_token(path, None)
    path.write_text("short")
    assert not holds_token(path, None)


def test_settings_keep_everything_but_their_credentials():
    token = SHAPES["access"]
    settings = {"a": f"x {token}", "b": [token, 3], "c": {"d": token}, "path": "/home/ann/x", "n": None, "r": 1e-3}
    redacted = {"a": "x [redacted]", "b": ["[redacted]", 3], "c": {"d": "[redacted]"}, "path": "/home/ann/x"}
    assert redact_settings(settings) == {**redacted, "n": None, "r": 1e-3}


@pytest.mark.parametrize("recipe", ["pretrain", "finetune"])
def test_no_file_of_a_run_holds_a_token(recipe, tmp_path, monkeypatch, seed_argv):
    from recipes import finetune, pretrain

    monkeypatch.setenv("HF_TOKEN", "hf_" + BODY[:34])
    given = "gh" + f"p_{BODY[::-1]}"
    sizes = {"pretrain": ["--num_train_steps", "2", "--save_steps", "1"], "finetune": ["--max_steps", "2"]}
    argv = ["--preset", "smoke", "--output_dir", str(tmp_path / "run"), "--data_name", f"my {given}", *sizes[recipe]]
    {"pretrain": pretrain, "finetune": finetune}[recipe].main([*argv, *seed_argv])
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"run.json", "run_config.json", "README.md", "report.html"} <= {path.name for path in files}
    secrets = (BODY[:20].encode(), BODY[::-1][:20].encode())
    assert not [path for path in files for secret in secrets if secret in path.read_bytes()]


def test_a_refusal_names_the_file_and_not_the_token(tmp_path):
    from bmtk.hub.bundle import Bundle, refuse_tokens

    (tmp_path / "README.md").write_text(SHAPES["OpenAI"])
    with pytest.raises(PublishError, match=r"README\.md in") as refused:
        refuse_tokens(Bundle(tmp_path, {"README.md": tmp_path / "README.md"}, ()), None)
    assert BODY[:10] not in str(refused.value)
