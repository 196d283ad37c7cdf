"""How a process ends: a user's error in one message, a fault of ours with its traceback, and no open connections."""

import contextlib
import io
import re
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from datasets.exceptions import DatasetGenerationError
from transformers.utils.versions import require_version

import bmtk  # noqa: F401
from bmtk.errors import Diverged, UserError, user_message
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.process import clean_errors


def test_a_terminal_that_cannot_show_a_letter_ends_no_run(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    with clean_errors():
        sys.stdout.write("très ✓")
    assert shown.getvalue() == rb"tr\xe8s \u2713"


def test_a_missing_package_of_an_option_is_named():
    with pytest.raises(PackageNotFoundError) as raised:
        require_version("no-such-package>=0.9.3")
    assert user_message(raised.value) == (
        "an option needs the package no-such-package>=0.9.3, which is not installed: "
        "pip install 'no-such-package>=0.9.3', or leave it out"
    )


def raise_from(module, error):
    """Raise `error` in code of the module of that name."""
    namespace = {"__name__": module, "error": error}
    exec("def fail():\n    raise error", namespace)
    namespace["fail"]()


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (UserError("batch_size=0 is out of range"), "batch_size=0 is out of range"),
        (FileNotFoundError("config file x.yaml does not exist"), "config file x.yaml does not exist"),
        (FloatingPointError("the loss of step 3 is nan"), "the loss of step 3 is nan"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "'utf-8' codec can't decode byte 0xff"),
        (MemoryError("Unable to allocate 9 GiB"), "out of memory: Unable to allocate 9 GiB\nlower micro_batch_size"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "out of memory: DefaultCPUAllocator: can't alloc",
        ),
        (RuntimeError("pair.cc:553] Connection closed by peer [::1]:7"), "another process of this run has stopped"),
        (DatasetGenerationError("no column in line 3"), "no column in line 3"),
    ],
)
def test_a_users_error_is_one_message_and_status_1(error, shown, capsys, monkeypatch):
    monkeypatch.delenv("BMTK_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped, clean_errors():
        raise error
    assert stopped.value.code == 1
    written = capsys.readouterr().err
    assert written.startswith(f"\nerror: {shown}")
    assert "Traceback" not in written


@pytest.mark.parametrize("end", [None, SystemExit(143)], ids=["done", "asked to stop"])
def test_a_process_that_ends_in_order_leaves_its_process_group(end, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    with contextlib.suppress(SystemExit), clean_errors():
        if end:
            raise end
    assert not torch.distributed.is_initialized()


def test_a_package_that_a_library_asks_for_is_the_users_to_install():
    for module, shown in [("transformers.trainer_optimizer", "pip install x"), ("bmtk.tasks.boxes", None)]:
        with pytest.raises(ImportError) as raised:
            raise_from(module, ImportError("pip install x"))
        assert user_message(raised.value) == shown
    # Attention of transformers' models stands beside the services of report_to.
    for module, shown in [("integration_utils", "pip install wandb"), ("sdpa_attention", None)]:
        with pytest.raises(RuntimeError) as failed:
            raise_from(f"transformers.integrations.{module}", RuntimeError("pip install wandb"))
        assert user_message(failed.value) == shown


@pytest.mark.parametrize(
    "module", ["bmtk.models.heads_bm", "transformers_modules.repo.heads_bm", "transformers.models.auto.auto_factory"]
)
def test_a_value_error_of_a_module_that_cannot_raise_ours_is_the_users(module, capsys, monkeypatch):
    monkeypatch.delenv("BMTK_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped, clean_errors():
        raise_from(module, ValueError("labels hold 7, which is not a token"))
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("\nerror: labels hold 7, which is not a token\n  (BMTK_DEBUG=1")


def test_a_run_that_diverged_has_an_exit_code_of_its_own(capsys, monkeypatch):
    monkeypatch.delenv("BMTK_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped, clean_errors():
        raise_from("bmtk.training.run_log", Diverged("step 9: skipping does not help"))
    assert stopped.value.code == 65
    assert capsys.readouterr().err.startswith("\nerror: step 9: skipping does not help\n")


def test_a_configuration_that_its_own_check_refuses_is_the_users(capsys, monkeypatch):
    monkeypatch.delenv("BMTK_DEBUG", raising=False)
    with pytest.raises(SystemExit), clean_errors():
        BmTransformerConfig(hidden_dropout=2.0)
    assert capsys.readouterr().err.startswith("\nerror: hidden_dropout=2.0 is not a probability; choose 0 <= ")


@pytest.mark.parametrize(
    "error",
    [
        TypeError("a bug"),
        KeyError("a bug"),
        ValueError("zip() argument 2 is shorter: a bug"),
        ZeroDivisionError("a bug"),
        AssertionError("a bug"),
    ],
)
def test_a_fault_of_ours_keeps_its_traceback_and_says_where_to_report_it(error, capsys, monkeypatch):
    monkeypatch.delenv("BMTK_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped, clean_errors():
        raise_from("bmtk.training.loop", error)
    assert stopped.value.code == 1
    written = capsys.readouterr().err
    assert "Traceback (most recent call last):" in written
    assert "in raise_from" in written
    *_, first, second = written.splitlines()
    assert re.fullmatch(rf"error: {type(error).__name__}: .*a bug'?\. This is a fault of bmtk, not of your .*", first)
    assert re.fullmatch(
        r"Please report it in the issue tracker of big-model-toolkit, .*: bmtk \S+, torch \S+, transformers \S+, "
        r"python [\d.]+",
        second,
    )


def test_an_interruption_is_no_error():
    with pytest.raises(KeyboardInterrupt), clean_errors():
        raise KeyboardInterrupt


def test_every_exception_passes_while_debugging(monkeypatch):
    monkeypatch.setenv("BMTK_DEBUG", "1")
    with pytest.raises(UserError, match="out of range"), clean_errors():
        raise UserError("out of range")
