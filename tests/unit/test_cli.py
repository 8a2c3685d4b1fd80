"""The command line: its options are frozen, its errors are one paragraph with status 2, and it imports nothing heavy for nothing."""

import os
import shlex
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from cyclopts import App

from pipelines import cli
from pipelines.errors import PipelineError
from pipelines.recipe_files import recipe_files
from pipelines.serve import check_schedule
from tests.commands import LOUPE, REPOSITORY
from workers.errors import RecordError

# A new option is a decision: it must set execution, never what is computed. Change this table when you have decided.
FROZEN = {
    "run": ["RECIPE", "--root", "--set", "--dry-run"],
    "build-dataset": ["RECIPE", "--root", "--set", "--dry-run"],
    "cache-features": ["RECIPE", "--root", "--set", "--dry-run"],
    "train": ["RECIPE", "--root", "--set", "--dry-run"],
    "evaluate": ["RECIPE", "--root", "--set", "--dry-run"],
    "export": ["RECIPE", "--root", "--set", "--to", "--merge", "--dry-run"],
    "report": ["RECIPE", "--root", "--set", "--dry-run"],
    "ask": ["EXPORT", "IMAGE", "QUESTION", "--mode", "--frames", "--layout", "--pool"],
    "show": ["WHAT", "RECIPE", "--root"],
    "plan": ["RECIPE", "--root", "--set", "--images", "--size", "--json"],
    "compare": ["RUN", "--root", "--metric", "--json"],
    "import-weights": ["SOURCES", "--recipe", "--root", "--connector-only", "--dry-run"],
    "convert-weights": ["SOURCE", "TARGET"],
    "recipes": [],
    "serve": ["RECIPE", "--root", "--set", "--cron", "--timezone", "--port"],
    "doctor storage": ["--root", "--megabytes", "--json"],
    "gc": ["--root", "--older-than", "--superseded", "--delete", "--json"],
    "verify": ["RECIPE", "--root", "--set", "--encoded", "--seed", "--repair", "--json"],
}


def commands(app: App = cli.app, before: str = "") -> dict[str, App]:
    """Every command by its words; those of a group by the group's as well."""
    found = {}
    for name, command in app.resolved_commands().items():
        if not name.startswith("-"):
            below = commands(command, f"{before}{name} ")
            found |= below or {f"{before}{name}": command}
    return found


def test_commands_and_options_are_frozen() -> None:
    assert set(commands()) == set(FROZEN)
    for name, command in commands().items():
        arguments = command.assemble_argument_collection()
        assert [argument.names[0] for argument in arguments] == FROZEN[name], name


def test_every_command_and_option_has_help() -> None:
    for name, command in commands().items():
        assert command.help, name
        for argument in command.assemble_argument_collection():
            assert argument.parameter.help, (name, argument.name)


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        cli.main(words)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(["recipes"], capsys)
    assert status == 0
    assert "demo" in out
    assert "detail-study" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "dmeo"], "loupe: found no recipe named 'dmeo'; did you mean 'demo'?"),
        (["run", "demo", "--set", "train_worker=2"], "did you mean 'train_workers'?"),
        (["run", "demo", "--set", "learning_rate=2"], "edit the recipe"),
        (["run", "demo", "--set", "train_workers"], "no 'key=value'"),
        (["ask", "/nowhere", "/nowhere.png", "What?"], "found no image file /nowhere.png"),
        (["run", "demo", "--learning-rate", "2"], "--learning-rate"),
        (["trian", "demo"], "did you mean 'train'? commands are"),
        (["doctor", "storge"], "did you mean 'storage'? commands are storage"),
        (
            ["run", "demo", "--set", "gr\udcfc\udcdf"],
            r"word 4 of the command line is no UTF-8 text, found 'gr\udcfc\udcdf'; type or save it as UTF-8",
        ),
        (["ask", "/nowhere", "/nowhere.png", " "], "ask: found the question ' '; write one"),
        (["run", "x" * 300], "found no recipe named"),
        (["serve", "demo", "--cron", "@daily"], "serve --cron: found '@daily'; allowed: five fields"),
        (["serve", "demo", "--cron", "99 3 * * *"], "found '99 3 * * *', where minute 99 is out of range; allowed: five fields, minute (0 to 59)"),
        (["serve", "demo", "--cron", "0 3 * * mon,5-8"], "where weekday 8 is out of range"),
        (["serve", "demo", "--timezone", "Europe"], "serve --timezone: found 'Europe'"),
        (["serve", "demo", "--timezone", "Europe/Berlyn"], "did you mean 'Europe/Berlin'?"),
        (["export", "demo", "--to", "llava-hf", "--dry-run"], "--to llava-hf: LlavaForConditionalGeneration does not compute this connector"),
        (["export", "demo", "--to", "gguf"], "llava-next-hf"),
        (["serve", "demo", "--port", "70000"], "serve --port: found 70000; allowed: 1 to 65535"),
    ],
)
def test_a_users_mistake_is_one_paragraph(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(words, capsys)
    assert status == 2
    assert message in (out + err).replace("\n", " ")
    assert "Traceback" not in out + err


def test_a_broken_recipe_is_named_by_file_and_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[datset]\n')
    status, _, err = run(["build-dataset", str(path)], capsys)
    assert status == 2
    assert (
        err
        == f"loupe: recipe {path}: top level: found the unknown key 'datset'; did you mean 'dataset'? allowed here: "
        + err.partition("allowed here: ")[2]
    )


@pytest.mark.parametrize(("content", "message"), [(b"name = '\xff'", "is no UTF-8 text"), (b"\xef\xbb\xbfnam = 'a'", "unknown key 'nam'")])
def test_what_a_recipe_may_be_written_in(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    status, _, err = run(["run", str(path)], capsys)
    assert status == 2
    assert message in err


def test_a_port_in_use_is_said_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, _, err = run(["serve", "demo", "--port", str(taken.getsockname()[1])], capsys)
    assert status == 2
    assert "cannot be listened on" in err


def test_the_user_s_own_flow_server_may_listen_where_ours_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        check_schedule("0 3 * * *", "UTC", taken.getsockname()[1])


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"], capsys)[1].strip() == version("loupe") != "0.0.0"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["recipes", "run demo --dry-run"])
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path, unbuffered: str, words: str) -> None:
    """Through a buffer the pipe is found closed only when the command is at its end."""
    command = f"(sleep 0.2; {sys.executable} -m pipelines.cli {words}; echo $? > {tmp_path}/status) | true; sleep 0.2"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert done.stderr == ""
    assert (tmp_path / "status").read_text().strip() == "141"


def test_another_broken_pipe_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "load_recipe", broken)
    reading, writing = os.pipe()
    with os.fdopen(reading), os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(BrokenPipeError):
            cli.main(["run", "demo"])


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_recipe", interrupted)
    status, _, err = run(["run", "demo"], capsys)
    assert status == 130
    assert err == "loupe: interrupted; run the same command to resume\n"


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "load_recipe", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "demo"])


def test_pipeline_errors_have_one_base() -> None:
    from pipelines import errors

    names = [name for name in errors.__all__ if name != "PipelineError"]
    assert sorted(errors.__all__) == errors.__all__
    assert all(issubclass(getattr(errors, name), PipelineError) for name in names)
    assert all(name in (errors.__doc__ or "") for name in errors.__all__)


def test_light_commands_import_nothing_heavy() -> None:
    program = (
        "import sys\nfrom pipelines import cli\n"
        "try:\n    cli.main(['recipes'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'ray', 'prefect', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("program", "root", "image", "expected"),
    [
        (".venv/bin/loupe", "data", "images/a b.png", ".venv/bin/loupe ask data/exports/x 'data/images/a b.png' 'What is it?'"),
        ("loupe", "data", "file:///elsewhere/a%20b.png", "loupe ask data/exports/x '/elsewhere/a b.png' 'What is it?'"),
        ("/elsewhere/cli.py", "data", "s3://bucket/a.png", "loupe ask data/exports/x s3://bucket/a.png 'What is it?'"),
    ],
)
def test_the_printed_ask_command_can_be_pasted(tmp_path, monkeypatch, program, root, image, expected) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [program, "run"])
    record = {"folder": "exports/x", "check_image": image, "check_question": "What is it?"}
    assert cli._ask_command(root, {"record": record}) == expected


def test_a_record_that_lacks_what_is_printed_is_named() -> None:
    with pytest.raises(RecordError, match=r"runs/export/abc/COMMITTED\.json in the root should have a text as 'folder', found None"):
        cli._ask_command("data", {"stage": "export", "key": "abc", "record": {"seconds": 1}})


def test_an_unknown_command_is_told_all_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = run(["nothing"], capsys)
    assert all(name.split()[0] in err for name in FROZEN)


def test_help_shows_no_empty_default(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(["run", "--help"], capsys)
    assert "()" not in out
    assert "Recipe keys" in out


@pytest.mark.parametrize("cron", ["0 3 * * *", "*/5,30 0-23/2 1,L 1-12 sun", "59 23 31 12 7", "0 0 * jan mon#2"])
def test_schedules_that_cron_knows_are_not_refused(cron: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    check_schedule(cron, "UTC", 4200)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_any_text_can_be_printed_in_any_encoding(encoding: str) -> None:
    program = "import sys\nfrom pipelines import cli\ncli._ready_streams()\nprint('\\u2026\\udcf6')"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=environment, cwd=REPOSITORY)
    assert done.stdout == "\u2026\\udcf6\n".encode(encoding, errors="backslashreplace")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["recipes"], ["--version"]])
def test_output_that_cannot_be_written_is_one_line(words: list[str], unbuffered: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        command = [*LOUPE, *words]
        done = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY)
    assert done.returncode == 2
    assert done.stderr == "loupe: standard output cannot be written (No space left on device); send it elsewhere and run again\n"


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed: str) -> None:
    done = subprocess.run(["bash", "-c", f"{shlex.join(LOUPE)} recipes {closed}"], check=False, capture_output=True, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_error_of_another_file_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise FileNotFoundError(2, "No such file", "/elsewhere")

    monkeypatch.setattr(cli, "load_recipe", broken)
    with pytest.raises(FileNotFoundError):
        cli.main(["run", "demo"])


def test_a_working_folder_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    status, _, err = run(["run", "demo", "--dry-run"], capsys)
    assert (status, err) == (2, "loupe: the working folder was deleted; change into one that is there and run again\n")


def test_tables_are_not_cut_where_no_terminal_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    _, out, _ = run(["recipes"], capsys)
    assert len(out.splitlines()) == 1 + len(recipe_files()) + 1  # headings, and where the files are
    assert all(name in out for name in recipe_files())
    where = out.splitlines()[-1].removeprefix("Files: ")
    assert all(path == Path(where) / f"{name}.toml" for name, path in recipe_files().items())
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = run(["recipes"], capsys)
    assert all(len(line) <= 60 for line in out.splitlines()[:-1])
    assert out.isascii()  # folded, not cut with an ellipsis


def test_merging_without_adapters_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(["export", "demo", "--merge", "--dry-run"], capsys)
    assert status == 2
    assert "--merge adds trained adapters to the language model's weights, but the recipe has no language_model.lora; leave --merge out" in err


def test_a_dry_run_plans_no_further_than_its_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    planned: list[str] = []
    monkeypatch.setattr("pipelines.plan.print_plan", lambda experiment, until, form: planned.append(until))
    for command in ("build-dataset", "train", "run"):
        assert run([command, "demo", "--dry-run"], capsys)[0] == 0
    assert planned == ["build-dataset", "train-connector", "report"]
