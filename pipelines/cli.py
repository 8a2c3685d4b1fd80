"""The `loupe` command. It sets execution only (where, how fast, how far); what is computed stands in the recipe.

Whatever a user can put right ends with one paragraph on standard error and status 2; what a command was to look at and found wrong, with status 1.
Ctrl-C ends with status 130, SIGTERM with 143, and both with a state that the next run resumes. Prefect, Ray and torch are imported only by the
commands that use them.
"""

import errno
import io
import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, CycloptsPanel, Parameter, UnknownCommandError
from rich.table import Table

from model.errors import ModelError, closest, first_line
from model.metrics import MetricName
from model.specs import ExportForm
from pipelines.errors import FaultsFoundError, FlowServerError, PipelineError
from pipelines.recipe_files import RECIPES_FOLDER, RecipeFile, load_recipe, recipe_files
from pipelines.settings import execution_settings, settings_from_words, size_from_word
from pipelines.wording import data_console, print_table
from workers.commits import StageName
from workers.errors import RecordError, WorkerError

__all__ = ["app", "main"]

FAULTS_FOUND = 1
USER_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143
BROKEN_PIPE = 141

app = App(
    name="loupe",
    help="Turns high-detail images and their questions into a trained vision-language connector. A recipe says what; options say where and how.",
    version=lambda: version("loupe"),
    suppress_keyboard_interrupt=False,  # main says how to go on
)

RecipeWord = Annotated[str, Parameter(help="Name of a recipe that comes with Loupe (see `loupe recipes`), or the path of a TOML file.")]
Root = Annotated[str, Parameter(name="--root", help="Where everything durable lies: a folder, file://... or s3://bucket/prefix.")]
Settings = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        help="An execution setting, key=value; may repeat. Settings change speed and memory, never results; README's section \"Recipe keys and "
        'settings" lists them.',
        negative=(),
        show_default=False,
    ),
]
DryRun = Annotated[bool, Parameter(name="--dry-run", help="Check everything, print the plan, start nothing, write nothing.", negative=())]

Form = Annotated[
    ExportForm,
    Parameter(
        name="--to",
        help="What to write: `folder`, which `loupe ask` reads; `llava-hf` or `llava-next-hf`, transformers' own LLaVA or LLaVA-NeXT, where the "
        "connector folds into it; `loupe`, a transformers model of Loupe's classes; `llava`, files in the layout of the papers' authors.",
    ),
]

Merge = Annotated[
    bool,
    Parameter(
        name="--merge",
        help="Add trained adapters to the language model's weights; forms other than `folder` hold them so always.",
        negative=(),
    ),
]

DEFAULT_ROOT = "loupe-data"


def _run_until(
    recipe: str, root: str, settings: tuple[str, ...], until: StageName, *, dry_run: bool, form: ExportForm = "folder", merge: bool = False
) -> list[dict[str, Any]]:
    """Check the recipe, then run its flow up to a stage."""
    from pipelines.flow_server import start_flow_server

    file = load_recipe(recipe)
    by_name = settings_from_words(settings)
    execution = execution_settings(by_name, file.recipe)
    server = None if dry_run else start_flow_server()
    from pipelines.stages import check_ready, open_experiment
    from workers.storage import Store

    # Once before the flow, so that a mistake is told before anything starts; the server comes up meanwhile.
    experiment = open_experiment(file, Store(root), execution, planning=dry_run, merge_export=merge)
    experiment.check_form(form)
    if dry_run:
        from pipelines.plan import print_plan

        print_plan(experiment, until, form)
        return []
    check_ready(experiment)
    assert server is not None
    from pipelines.flow import loupe_flow

    server.wait_until_ready()
    import httpx

    flow_recipe = _flow_recipe(file, recipe)
    try:
        outcomes: list[dict[str, Any]] = loupe_flow(
            recipe=flow_recipe, root=experiment.store.root, settings=by_name, until=until, form=form, merge=merge
        )
    except httpx.HTTPError as error:
        raise FlowServerError(
            f"the flow's server at {server.url} went away ({first_line(error)}). What is done is kept: run the same command to go on."
        ) from error
    return outcomes


def _flow_recipe(file: RecipeFile, word: str) -> str:
    """How a flow run names its recipe: shipped ones by name, files by their whole path, since it may run in another folder."""
    return word if word in recipe_files() else str(file.path.resolve())


def _shown(root: str, reference: str) -> str:
    """Where something lies, below the root or by its own URL, as a person would type it from here."""
    from pipelines.stages import shown_path
    from workers.storage import Store

    text = shown_path(Store(root).reference_url(reference))
    shown = Path(text)
    if not shown.is_absolute():
        return text  # a URL
    return str(shown.relative_to(Path.cwd()) if shown.is_relative_to(Path.cwd()) else shown)


def _recorded(outcome: dict[str, Any], field: str) -> str:
    """A text out of a stage's record."""
    text = outcome["record"].get(field)
    if not isinstance(text, str):
        path = f"runs/{outcome['stage']}/{outcome['key']}/COMMITTED.json"
        raise RecordError(f"{path} in the root should have a text as {field!r}, found {text!r}; remove that file, and the stage is run again")
    return text


def _ask_command(root: str, export: dict[str, Any]) -> str:
    """A command that can be pasted: this program, the export, a held-out image, a question about a small detail of it."""
    program = Path(sys.argv[0])
    here = str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program)
    name = here if program.name == "loupe" else "loupe"
    folder, image, question = (_recorded(export, field) for field in ("folder", "check_image", "check_question"))
    return shlex.join([name, "ask", _shown(root, folder), _shown(root, image), question])


@app.command
def run(recipe: RecipeWord, /, *, root: Root = DEFAULT_ROOT, settings: Settings = (), dry_run: DryRun = False) -> None:
    """Run a recipe from its sources to its report. What is done already is found done; what was interrupted goes on where it was."""
    outcomes = _run_until(recipe, root, settings, "report", dry_run=dry_run)
    if outcomes:
        export = next(outcome for outcome in outcomes if outcome["stage"] == "export")
        print()
        print(f"Ask it:  {_ask_command(root, export)}")
        print(f"Report:  {_shown(root, _recorded(outcomes[-1], 'path'))}")


@app.command(name="build-dataset")
def build_dataset(recipe: RecipeWord, /, *, root: Root = DEFAULT_ROOT, settings: Settings = (), dry_run: DryRun = False) -> None:
    """Build the recipe's dataset: images, questions, splits."""
    _run_until(recipe, root, settings, "build-dataset", dry_run=dry_run)


@app.command(name="cache-features")
def cache_features(recipe: RecipeWord, /, *, root: Root = DEFAULT_ROOT, settings: Settings = (), dry_run: DryRun = False) -> None:
    """Cache the encoder's features of every view, after what comes before."""
    _run_until(recipe, root, settings, "cache-features", dry_run=dry_run)


@app.command
def train(recipe: RecipeWord, /, *, root: Root = DEFAULT_ROOT, settings: Settings = (), dry_run: DryRun = False) -> None:
    """Train the connector, every seed, after what comes before."""
    _run_until(recipe, root, settings, "train-connector", dry_run=dry_run)


@app.command
def evaluate(recipe: RecipeWord, /, *, root: Root = DEFAULT_ROOT, settings: Settings = (), dry_run: DryRun = False) -> None:
    """Ask the held-out questions, every seed, after what comes before."""
    _run_until(recipe, root, settings, "evaluate", dry_run=dry_run)


@app.command
def export(
    recipe: RecipeWord,
    /,
    *,
    root: Root = DEFAULT_ROOT,
    settings: Settings = (),
    form: Form = "folder",
    merge: Merge = False,
    dry_run: DryRun = False,
) -> None:
    """Write the export folder of the first seed, after what comes before. Its path is printed last."""
    outcomes = _run_until(recipe, root, settings, "export", dry_run=dry_run, form=form, merge=merge)
    if outcomes:
        print(_shown(root, _recorded(outcomes[-1], "folder")))


@app.command
def report(recipe: RecipeWord, /, *, root: Root = DEFAULT_ROOT, settings: Settings = (), dry_run: DryRun = False) -> None:
    """Write the report page, after what comes before. Its path is printed last."""
    outcomes = _run_until(recipe, root, settings, "report", dry_run=dry_run)
    if outcomes:
        print(_shown(root, _recorded(outcomes[-1], "path")))


@app.command
def ask(
    export_folder: Annotated[str, Parameter(name="EXPORT", help="An export folder, as a path or URL.")],
    image: Annotated[str, Parameter(name="IMAGE", help="An image file, or with --frames a video, as a path or URL.")],
    question: Annotated[str, Parameter(name="QUESTION", help="What to ask about it.")],
    /,
    *,
    mode: Annotated[Literal["blind", "global", "local", "both"], Parameter(name="--mode", help="Which views the model sees.")] = "both",
    frames: Annotated[int, Parameter(name="--frames", help="Of a video or an animation, so many frames are shown; 0 takes IMAGE for an image.")] = 0,
    layout: Annotated[
        Literal["frames", "grid"] | None,
        Parameter(name="--layout", help="Frames one after the other, or as the tiles of one picture. By default: grid where there are local views."),
    ] = None,
    pool: Annotated[
        int | None, Parameter(name="--pool", help="Of --layout frames: so many neighbouring tokens of a frame become one. By default: 2.")
    ] = None,
) -> None:
    """Ask an exported model about an image or a video; the answer is all that goes to standard output."""
    from pipelines.ask import FrameChoice, ask_export

    answer = ask_export(export_folder, image, question, mode, FrameChoice(num=frames, layout=layout, pool=pool))
    print(answer.text)


@app.command
def show(
    what: Annotated[Literal["dataset", "cache", "run"], Parameter(name="WHAT", help="A dataset, a cache, or a whole run.")],
    recipe: RecipeWord,
    /,
    *,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Show what a recipe has left in a root. Reads only."""
    from pipelines.show import show_recipe
    from pipelines.stages import open_experiment
    from workers.storage import Store

    file = load_recipe(recipe)
    show_recipe(what, open_experiment(file, Store(root), execution_settings({}, file.recipe), planning=True), root)


@app.command(name="import-weights")
def import_weights(
    *sources: Annotated[Path, Parameter(name="SOURCES", help="The folder of a released model, or its files (mm_projector.bin, sampler.bin).")],
    recipe: Annotated[str, Parameter(name="--recipe", help="The recipe whose connector and encoder the weights are for: a name or a path.")],
    root: Root = DEFAULT_ROOT,
    connector_only: Annotated[
        bool, Parameter(name="--connector-only", help="Leave the language model of a whole model where it is.", negative=())
    ] = False,
    dry_run: Annotated[bool, Parameter(name="--dry-run", help="Check the files, print the report, write nothing.", negative=())] = False,
) -> None:
    """Make the released weights of Dense Connector, SliME or LLaVA into a connector (and a language model) that recipes can name."""
    from pipelines.importing import import_for_recipe

    import_for_recipe(sources, load_recipe(recipe), root, connector_only=connector_only, dry_run=dry_run)


@app.command(name="convert-weights")
def convert_weights(
    source: Annotated[str, Parameter(name="SOURCE", help="A model folder whose weights are .bin files, or the hub id of such a model.")],
    target: Annotated[Path, Parameter(name="TARGET", help="The folder to write; recipes name it as their model.")],
    /,
) -> None:
    """Make a model that is published as torch's .bin files into one of safetensors, which is all that Loupe loads. Nothing in the files is run."""
    from pipelines.importing import convert

    convert(source, target)


@app.command
def plan(
    recipe: RecipeWord,
    /,
    *,
    root: Root = DEFAULT_ROOT,
    settings: Settings = (),
    images: Annotated[int | None, Parameter(name="--images", help="Plan for so many images, in place of the dataset's.")] = None,
    size: Annotated[str | None, Parameter(name="--size", help="With --images, their width and height, such as 1024x768.")] = None,
    as_json: Annotated[bool, Parameter(name="--json", help="Print JSON instead of tables.", negative=())] = False,
) -> None:
    """What a recipe's feature cache takes before it is made: bytes, hours, dollars, and from which training pass on it pays."""
    from pipelines.cache_plan import check_given_images, make_cache_plan
    from pipelines.cache_plan_text import print_cache_plan
    from pipelines.stages import open_experiment
    from workers.storage import Store

    size_px = None if size is None else size_from_word(size)
    check_given_images(images, size_px)
    file = load_recipe(recipe)
    execution = execution_settings(settings_from_words(settings), file.recipe)
    experiment = open_experiment(file, Store(root), execution, planning=True)
    print_cache_plan(make_cache_plan(experiment, images=images, size_px=size_px), as_json=as_json)


@app.command
def compare(
    *runs: Annotated[
        str,
        Parameter(
            name="RUN",
            help="Two or more: a recipe, for all its seeds that are evaluated in the root, or the key of an evaluate stage, or the beginning of one.",
        ),
    ],
    root: Root = DEFAULT_ROOT,
    metric: Annotated[MetricName | None, Parameter(name="--metric", help="What to compare by; the first run's main metric when absent.")] = None,
    as_json: Annotated[bool, Parameter(name="--json", help="Print JSON instead of a table.", negative=())] = False,
) -> None:
    """Compare finished evaluations on the questions that they share: means, and differences to the first run, with 95 % intervals."""
    from pipelines.compare import compare_runs, find_runs, print_comparison
    from workers.storage import Store

    print_comparison(compare_runs(find_runs(runs, Store(root)), metric), as_json=as_json)


@app.command
def recipes() -> None:
    """List the recipes that come with Loupe."""
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", overflow="fold")
    table.add_column("what it does", overflow="fold")
    for name in recipe_files():
        table.add_row(name, load_recipe(name).recipe.description)
    print_table(table)
    data_console().print(f"Files: {RECIPES_FOLDER}", soft_wrap=True)


@app.command
def serve(
    recipe: RecipeWord,
    /,
    *,
    root: Root = DEFAULT_ROOT,
    settings: Settings = (),
    cron: Annotated[str, Parameter(name="--cron", help="When to run: minute hour day month weekday.")] = "0 3 * * *",
    timezone: Annotated[str, Parameter(name="--timezone", help="IANA time zone of the schedule.")] = "UTC",
    port: Annotated[int, Parameter(name="--port", help="Port of the Prefect UI, on loopback.")] = 4200,
) -> None:
    """Run a recipe on a schedule, and show its runs in the Prefect UI. Runs until Ctrl-C."""
    from pipelines.serve import check_schedule, serve_recipe
    from pipelines.stages import check_ready, open_experiment
    from workers.storage import Store

    check_schedule(cron, timezone, port)
    file = load_recipe(recipe)
    by_name = settings_from_words(settings)
    check_ready(open_experiment(file, Store(root), execution_settings(by_name, file.recipe)))
    serve_recipe(_flow_recipe(file, recipe), root, by_name, cron=cron, timezone=timezone, port=port)


@app.command
def verify(
    recipe: RecipeWord,
    /,
    *,
    root: Root = DEFAULT_ROOT,
    settings: Settings = (),
    encoded: Annotated[int, Parameter(name="--encoded", help="How many cached images are encoded again and compared.")] = 8,
    seed: Annotated[int | None, Parameter(name="--seed", help="Which ones, as an earlier look named it; by default others every time.")] = None,
    repair: Annotated[
        bool,
        Parameter(name="--repair", help="Make the index anew from the files, and drop damaged ones; while no run writes to it.", negative=()),
    ] = False,
    as_json: Annotated[bool, Parameter(name="--json", help="Print JSON instead of a table.", negative=())] = False,
) -> None:
    """Look whether a recipe's cache is whole and true: every row once, every byte as written, a sample encoded again. Or repair it.

    Ends with status 1 where it found faults.
    """
    from pipelines.cache_care import repair_experiment, verify_experiment
    from pipelines.stages import open_experiment
    from workers.storage import Store

    file = load_recipe(recipe)
    experiment = open_experiment(file, Store(root), execution_settings(settings_from_words(settings), file.recipe))
    if repair:
        repair_experiment(experiment, as_json=as_json)
        return
    verify_experiment(experiment, num_encoded=encoded, seed=seed, as_json=as_json)


@app.command
def gc(
    *,
    root: Root = DEFAULT_ROOT,
    older_than: Annotated[float, Parameter(name="--older-than", help="Hours; what is younger may belong to a run and is left alone.")] = 24.0,
    superseded: Annotated[
        bool, Parameter(name="--superseded", help="Also whole caches that no recipe uses any more and no unfinished run reads.", negative=())
    ] = False,
    delete: Annotated[bool, Parameter(name="--delete", help="Remove what is listed; without it nothing is.", negative=())] = False,
    as_json: Annotated[bool, Parameter(name="--json", help="Print JSON instead of tables.", negative=())] = False,
) -> None:
    """List the caches of a root, and what in it serves nobody: leftovers of killed runs, files that no table names. Removes it with --delete."""
    from pipelines.cache_care import sweep_root

    sweep_root(root, older_than_h=older_than, superseded=superseded, delete=delete, as_json=as_json)


doctor = App(name="doctor", help="Look whether what Loupe runs on does what Loupe needs, and how fast.")
app.command(doctor)


@doctor.command(name="storage")
def doctor_storage(
    *,
    root: Root = DEFAULT_ROOT,
    megabytes: Annotated[int, Parameter(name="--megabytes", help="Size of the large object that is written and read, in MiB.")] = 64,
    as_json: Annotated[bool, Parameter(name="--json", help="Print JSON instead of a table.", negative=())] = False,
) -> None:
    """Measure a root with every client that can reach it, on objects that are removed again. Ends with status 1 where Loupe must not be used."""
    from pipelines.doctor import examine_storage, print_storage_report

    report = examine_storage(root, megabytes)
    print_storage_report(report, as_json=as_json)
    if not report.creates_exclusively:
        raise FaultsFoundError(f"exclusive creation does not hold on {report.root}; do not use Loupe there")


def _quiet_environment() -> None:
    """No telemetry and no chatter from the libraries; what the user has set stands."""
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",  # transformers shows one while it converts GGUF, in log files too
        "PYTHONWARNINGS": "ignore",
    }
    if not Path("/dev/nvidiactl").exists():
        wanted["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed warns, on standard output, that it had to find that out itself
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _ready_streams() -> None:
    """Streams that are there and take any text: what their encoding lacks is written as an escape, a closed one leads nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            # It takes the lowest free number, which is the closed one's; else the next file to be opened would, and hold what is printed.
            stream = Path(os.devnull).open(mode)  # noqa: SIM115 - stays open
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_words(words: list[str]) -> None:
    for number, word in enumerate(words, 1):
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise PipelineError(f"word {number} of the command line is no UTF-8 text, found {word!a}; type or save it as UTF-8") from error


def _output_fault() -> OSError | None:
    """What keeps standard output from being written. Where nothing does, asking costs an empty line there, before a traceback."""
    try:
        print(flush=True)
    except OSError as error:
        return error
    return None


def _working_folder_is_gone() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _end_of_output(error: OSError) -> int:
    """Say what an error of standard output, or of a working folder that is gone, means, and with which status to end.

    Args:
        error: of any file.

    Returns:
        The status.

    Raises:
        OSError: `error` itself, where it is of something else.
    """
    if isinstance(error, FileNotFoundError) and _working_folder_is_gone():
        print("loupe: the working folder was deleted; change into one that is there and run again", file=sys.stderr)
        return USER_ERROR
    fault = _output_fault()
    if fault is None or fault.errno != error.errno:
        raise error
    # What is still in the buffer goes nowhere: Python's own flush at exit would complain once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if fault.errno == errno.EPIPE:
        return BROKEN_PIPE  # whoever read our output has seen enough (`loupe show ... | head`)
    print(f"loupe: standard output cannot be written ({fault.strerror}); send it elsewhere and run again", file=sys.stderr)
    return USER_ERROR


def _told(error: CycloptsError) -> Any:
    """What is printed of a mistake in the words; of the commands cyclopts itself lists eight at most."""
    if not isinstance(error, UnknownCommandError) or not error.unused_tokens:
        return CycloptsPanel(error)
    word = error.unused_tokens[0]
    commands = [name for name in (error.app or app).resolved_commands() if not name.startswith("-")]
    return CycloptsPanel(f"Unknown command {word!r}; {closest(word, commands)}commands are {', '.join(commands)}")


def main(words: list[str] | None = None) -> None:
    """Run the command line and exit with its status.

    Args:
        words: instead of those of this process.
    """
    _quiet_environment()
    _ready_streams()
    try:
        Path.cwd()  # gone, it ends some libraries without a word
        _check_words(sys.argv[1:] if words is None else words)
        app(words, exit_on_error=False, print_error=True, error_formatter=_told, result_action="return_value")
        sys.stdout.flush()  # a pipe gets it only now, and may be closed
    except CycloptsError:
        sys.exit(USER_ERROR)  # cyclopts has printed it
    except (ModelError, WorkerError, PipelineError) as error:
        print(f"loupe: {error}", file=sys.stderr)
        sys.exit(FAULTS_FOUND if isinstance(error, FaultsFoundError) else USER_ERROR)
    except OSError as error:
        sys.exit(_end_of_output(error))
    except KeyboardInterrupt as error:
        from pipelines.interruption import Terminated

        print("loupe: interrupted; run the same command to resume", file=sys.stderr)
        sys.exit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED)


if __name__ == "__main__":
    main()
