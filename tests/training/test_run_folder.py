"""A run folder holds one run, one process trains in it, and whoever comes second is told what to do."""

import json
import os
import signal
import warnings

import pytest

from bmtk.errors import UserError
from bmtk.training.history import History
from bmtk.training.run_folder import check_output_dir, held, locked

CONFIG = {"learning_rate": 0.1, "betas": (0.9, 0.95), "save_steps": 10}


def test_the_same_run_may_come_back_with_another_cadence(tmp_path):
    for config in (CONFIG, CONFIG, CONFIG | {"save_steps": 5}):
        check_output_dir(tmp_path / "new", config, overwrite=False)


def test_the_main_process_holds_the_folder_and_no_other_touches_it(tmp_path):
    with held(tmp_path / "run", CONFIG, is_main=False, overwrite=False):
        assert not (tmp_path / "run").exists()
    with held(tmp_path / "run", CONFIG, overwrite=False):
        assert (tmp_path / "run" / "run_config.json").exists()
        assert (tmp_path / "run" / ".lock").read_text().startswith(f"process {os.getpid()} ")
    assert (tmp_path / "run" / ".lock").read_text() == ""


def test_a_run_that_never_begins_leaves_no_folder_and_takes_none_away(tmp_path):
    def begin(directory, leaving):
        with held(directory, CONFIG, overwrite=False):
            if leaving:
                (directory / leaving).write_text("made")
            raise KeyboardInterrupt

    def fail(directory, leaving=None):
        with pytest.raises(KeyboardInterrupt):
            begin(directory, leaving)
        return sorted(path.name for path in directory.glob("*"))

    fail(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert fail(tmp_path / "begun", "data_marks.json") == [".lock", "data_marks.json", "run_config.json"]
    (tmp_path / "mine").mkdir()
    assert fail(tmp_path / "mine") == [".lock", "run_config.json"]


def test_another_run_is_refused_with_the_keys_that_differ(tmp_path):
    check_output_dir(tmp_path, CONFIG, overwrite=False)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds another run") as told:
        check_output_dir(tmp_path, {"learning_rate": 0.2, "save_steps": 1, "extra": "x"}, overwrite=False)
    message = str(told.value)
    assert "learning_rate: 0.1 there, 0.2 now" in message
    assert "betas: [0.9, 0.95] there, '(absent)' now" in message
    assert "extra: '(absent)' there, 'x' now" in message
    assert "save_steps" not in message
    assert "choose another output_dir" in message
    assert "overwrite_output_dir" in message


def test_a_run_comes_back_to_a_version_that_knows_more_settings(tmp_path):
    check_output_dir(tmp_path, CONFIG, overwrite=False)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    check_output_dir(tmp_path, CONFIG | {"a_new_setting": None}, overwrite=False)
    new = CONFIG | {"a_new_setting": None, "momentum": 0.95}
    with pytest.raises(UserError, match=r"momentum: .\(absent\). there, 0\.95 now"):
        check_output_dir(tmp_path, new, overwrite=False)
    with pytest.raises(UserError, match="learning_rate"):
        check_output_dir(tmp_path, new | {"learning_rate": 0.2}, overwrite=False, default_keys=new)
    check_output_dir(tmp_path, new, overwrite=False, default_keys={"momentum"})


def test_a_run_comes_back_to_a_version_whose_default_does_something_else(tmp_path):
    check_output_dir(tmp_path, CONFIG, overwrite=False)
    (tmp_path / "model.safetensors").write_bytes(b"weights")

    def check(settings, defaults, record=CONFIG):
        (tmp_path / "run_config.json").write_text(json.dumps(record))
        check_output_dir(tmp_path, CONFIG | settings, overwrite=False, default_keys=defaults | {"task", "model"})

    recordings = {"task": "audio_classification", "normalize_each_band": False}
    with pytest.raises(UserError, match="normalize_each_band: True there, False now"):
        check(recordings, {"normalize_each_band"})
    check(recordings | {"normalize_each_band": True}, set())
    check(recordings | {"model": "a/model"}, {"normalize_each_band"})  # which decides that itself
    check(recordings, {"normalize_each_band"}, record=CONFIG | recordings)
    texts = {"task": "sequence_classification", "ngram_spelling": None}
    with pytest.raises(UserError, match="ngram_spelling: 0 there, None now"):
        check(texts, {"ngram_spelling"})
    check(texts | {"ngram_spelling": 0}, set())
    check(texts | {"ngram_buckets": 0}, {"ngram_spelling"})  # reads none either way
    check(texts | {"task": "causal_lm"}, {"ngram_spelling"})


def test_a_run_that_ended_before_its_first_checkpoint_gives_way_to_mended_settings(tmp_path):
    check_output_dir(tmp_path, CONFIG, overwrite=False)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "history.jsonl").write_text("{}")
    check_output_dir(tmp_path, CONFIG | {"learning_rate": 0.2}, overwrite=False)
    assert '"learning_rate": 0.2' in (tmp_path / "run_config.json").read_text()


def test_overwriting_deletes_the_former_run_and_nothing_else(tmp_path):
    check_output_dir(tmp_path, CONFIG, overwrite=False)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "trials" / "0000").mkdir(parents=True)
    for name in ("history.jsonl", "study.journal", "best.yaml"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "thesis.txt").write_text("mine")
    check_output_dir(tmp_path, {"learning_rate": 0.2}, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run_config.json", "thesis.txt"]
    check_output_dir(tmp_path, {"learning_rate": 0.2}, overwrite=False)


def test_the_same_run_is_refused_if_it_shall_not_go_on_and_has_something_to_lose(tmp_path):
    check_output_dir(tmp_path, CONFIG, overwrite=False, resume=False)
    check_output_dir(tmp_path, CONFIG, overwrite=False, resume=False)  # it has left nothing
    (tmp_path / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds checkpoints of a run.* set overwrite_output_dir to delete it, or ch"):
        check_output_dir(tmp_path, CONFIG, overwrite=False, resume=False)
    assert (tmp_path / "checkpoints" / "checkpoint-1").is_dir()
    check_output_dir(tmp_path, CONFIG, overwrite=True, resume=False)


def test_a_folder_with_a_foreign_model_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"holds model\.safetensors, but not a run"):
        check_output_dir(tmp_path, CONFIG, overwrite=False)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    told = r"output_dir='.*run' cannot be written \(Not a directory\); choose a folder"
    with pytest.raises(ValueError, match=told):
        check_output_dir(tmp_path / "file" / "run", CONFIG, overwrite=False)
    with pytest.raises(ValueError, match=told):
        locked(tmp_path / "file" / "run").__enter__()


def test_a_configuration_that_cannot_be_read_is_not_taken_for_the_same(tmp_path):
    (tmp_path / "run_config.json").write_text('{"learning_rate": 0.')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"run_config\.json cannot be read .*overwrite_output_dir"):
        check_output_dir(tmp_path, CONFIG, overwrite=False)


def in_child(body) -> int:
    """Wait status of a forked process that calls `body`: 0 when it returns, 256 when it raises ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 warns of threads, none of which the child needs
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            body()
            os._exit(0)
        except ValueError:
            os._exit(1)
        finally:
            os._exit(99)
    return os.waitpid(child, 0)[1]


def test_a_second_process_is_refused_while_the_first_one_lives(tmp_path):
    def enter():
        with locked(tmp_path):
            pass

    with locked(tmp_path):
        assert in_child(enter) == 256
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert in_child(enter) == 0


def test_the_refusal_names_the_process(tmp_path):
    read, write = os.pipe()
    with locked(tmp_path):

        def enter():
            try:
                with locked(tmp_path):
                    pass
            except ValueError as error:
                os.write(write, str(error).encode())

        in_child(enter)
    os.close(write)
    assert f"is in use by process {os.getpid()} on" in os.read(read, 1000).decode()


def test_the_lock_of_a_killed_process_is_no_lock(tmp_path):
    def die():
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == signal.SIGKILL
    assert (tmp_path / ".lock").read_text() != ""
    with locked(tmp_path):
        pass


def test_what_a_killed_process_has_left_half_written_is_deleted(tmp_path):
    for leftover in (".partial-model", "checkpoints/.partial-step-00000002"):
        (tmp_path / leftover).mkdir(parents=True)
        (tmp_path / leftover / "config.json").write_text("{")
    (tmp_path / "checkpoints" / "step-00000001").mkdir()
    with locked(tmp_path):
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoints"]


def test_history_forgets_what_a_resumed_run_will_write_again(tmp_path):
    history = History(tmp_path)
    for step in (1, 2, 3):
        history.append({"step": step, "loss": 1.5})
    with history.path.open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    history.cut(after=2)
    assert history.path.read_text() == '{"step": 1, "loss": 1.5}\n{"step": 2, "loss": 1.5}\n'


def test_history_writes_what_is_not_a_number_as_null(tmp_path):
    history = History(tmp_path)
    history.append({"step": 1, "validation/loss": float("nan"), "x": float("inf")})
    assert history.read() == [{"step": 1, "validation/loss": None, "x": None}]
