"""How the `bmtk` command reports an error: one line for what the user can mend, a traceback for a fault of bmtk."""

import json

import pytest
import torch
from safetensors.torch import save_file

import bmtk_cli
from bmtk.errors import UserError
from bmtk.tools import info


def test_a_users_error_is_one_line_of_the_command(capsys):
    assert bmtk_cli.report(UserError("outputs exists and is not an empty folder; choose another"), "convert") == 1
    assert capsys.readouterr().err == "bmtk convert: outputs exists and is not an empty folder; choose another\n"


def test_a_damaged_file_is_the_users_error(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert bmtk_cli.main(["info", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"bmtk info: {tmp_path / 'config.json'} is not valid JSON: ")


@pytest.mark.parametrize("error", [KeyError("a bug"), ValueError("a bug"), TypeError("a bug")])
def test_a_fault_of_ours_keeps_its_traceback(error, tmp_path, capsys, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    monkeypatch.setattr(info, "read_header", fails)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert bmtk_cli.main(["info", str(tmp_path)]) == 1
    written = capsys.readouterr().err
    assert "Traceback (most recent call last):" in written
    assert "in fails" in written
    assert "This is a fault of bmtk" in written
    assert "transformers" in written.splitlines()[-2]


def test_info_counts_parameters_and_not_what_else_is_saved_with_them(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bm_cnn"}))
    layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    layer.register_buffer("spelling", torch.zeros(7, 2, dtype=torch.int32))
    save_file(layer.state_dict(), tmp_path / "model.safetensors")
    assert bmtk_cli.main(["info", str(tmp_path)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["parameters"] == str(sum(parameter.numel() for parameter in layer.parameters()))
    assert lines["stored"].split() == ["as", "F32"]


def test_info_is_in_two_columns_whatever_the_names_are(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bm_rnn", "architectures": ["BmRnnModel"]}))
    for name in ("a_bm.py", "b_bm.py", "c_bm.py", "modeling_bm_rnn.py"):
        (tmp_path / name).touch()
    metrics = {"validation/entity_of_a_long_name_f1": 0.5, "test/tokens": 45672}
    (tmp_path / "run.json").write_text(json.dumps({"metrics": metrics}))
    assert bmtk_cli.main(["info", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    width = len("validation/entity_of_a_long_name_f1  ")
    assert {line[width - 2 : width] for line in lines} == {"  "}
    assert lines[-2:] == ["validation/entity_of_a_long_name_f1  0.5000", f"{'test/tokens':{width}}45,672"]
    assert f"{'own code':{width}}modeling_bm_rnn.py, a_bm.py, b_bm.py and 1 more" in lines
