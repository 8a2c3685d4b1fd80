"""Starting from given weights: they are checked before anything starts, kept in the root, and a recipe without phases evaluates them as they are."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from model.connector import build_connector
from model.encoder import describe_encoder
from model.errors import SpecError
from model.specs import (
    BranchMix,
    CompressionSpec,
    ConnectorSpec,
    DCISpec,
    GatedMixtureSpec,
    GlobalBranchSpec,
    LocalBranchSpec,
    MLPSpec,
    PhaseSpec,
    ScheduleSpec,
    SingleSpec,
    fingerprint,
)
from model.views import ViewSpec
from pipelines.errors import RecipeError
from pipelines.plan import plan_lines
from pipelines.recipe_files import load_recipe
from pipelines.stages import open_experiment, run_stage, stage_runs
from tests.released import ReferenceProjector, shake, slime_modules, write_dense, write_slime
from tests.tiny import TINY_HIDDEN, TINY_WIDTH, tiny_recipe
from tests.tiny_training import build_small_store, tiny_connector_spec, tiny_encoder_spec, tiny_schedule, tiny_training_spec
from workers.errors import TrainingError
from workers.evaluation import EvaluationSpec, evaluate
from workers.execution import ExecutionSettings, SilentProgress
from workers.exporting import ExportSpec, export
from workers.importing import import_weights
from workers.storage import Store
from workers.training.assemble import load_trained
from workers.training.initial_weights import check_weights, initial_tensors, keep_weights, open_weights, start_from
from workers.training.run import train_connector, train_stage

NOTHING = ScheduleSpec(align=(), sft=None)


def connector(seed=0, spec=None, hidden=TINY_HIDDEN):
    built = build_connector(spec or tiny_connector_spec(), tiny_encoder_spec(), hidden=hidden, embedding_rms=0.5, seed=seed)
    shake(built, seed)
    return built


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "connector.safetensors"
    save_file(connector().state_dict(), path)
    return path


def test_weights_reach_a_connector_by_way_of_the_root(weights, tmp_path):
    store = Store(str(tmp_path / "root"))
    file, tensors = open_weights(str(weights))
    keep_weights(store, file)
    weights.unlink()  # from here on the root has all
    keep_weights(store, file)
    target = connector(seed=1)
    start_from(target, store, file.sha256, tiny_encoder_spec())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in target.state_dict().items())
    assert float(target.token_scale) == 0.5


def test_the_root_s_copy_is_checked(weights, tmp_path):
    store = Store(str(tmp_path / "root"))
    file, _ = open_weights(str(weights))
    with pytest.raises(TrainingError, match=rf"weights/{file.sha256}\.safetensors, from which training starts, is not there"):
        initial_tensors(store, file.sha256)
    keep_weights(store, file)
    path = store.local_path(f"weights/{file.sha256}.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(TrainingError, match="is damaged; remove it and run the recipe again"):
        initial_tensors(store, file.sha256)


def test_a_file_that_changed_under_way_is_not_taken(weights, tmp_path):
    file, _ = open_weights(str(weights))
    save_file(connector(seed=9).state_dict(), weights)
    with pytest.raises(TrainingError, match="has changed since the run was planned"):
        keep_weights(Store(str(tmp_path / "root")), file)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda held: held.pop("gate.weight"), r"another connector than the recipe describes .*\n  gate\.weight: expected \[24, 2\], found nothing"),
        (lambda held: held.update(more=torch.zeros(2)), r"more: expected nothing, found \[2\]"),
        (lambda held: held.update({"gate.weight": torch.zeros(2, 24)}), r"gate\.weight: expected \[24, 2\] of torch\.float32, found \[2, 24\]"),
        (lambda held: held.update({"gate.weight": torch.zeros(24, 2).half()}), r"gate\.weight: expected .*, found \[24, 2\] of torch\.float16"),
    ],
)
def test_weights_of_another_connector_are_refused(edit, message):
    tensors = connector().state_dict()
    edit(tensors)
    with pytest.raises(TrainingError, match=message):
        check_weights(tensors, "x", tiny_connector_spec(), tiny_encoder_spec(), TINY_HIDDEN)


def test_weights_of_another_language_model_are_refused():
    with pytest.raises(TrainingError, match=r"model's width 32.*\n  global_mlp\.linear_1\.weight: expected \[32, 24\] of .*, found \[64, 24\]"):
        check_weights(connector().state_dict(), "x", tiny_connector_spec(), tiny_encoder_spec(), 32)


def test_a_standardisation_that_the_recipe_leaves_out_is_refused():
    plain = tiny_connector_spec(standardise_inputs=False)
    held = connector().state_dict()
    check_weights(held, "x", plain, tiny_encoder_spec(), TINY_HIDDEN)
    held["local_input.mean"] = held["local_input.mean"] + 1
    check_weights(held, "x", tiny_connector_spec(), tiny_encoder_spec(), TINY_HIDDEN)
    with pytest.raises(TrainingError, match="centres and scales its inputs, the recipe has standardise_inputs = false"):
        check_weights(held, "x", plain, tiny_encoder_spec(), TINY_HIDDEN)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 a torch file", save({"a": torch.ones(2)})[:-3]])
def test_what_is_no_safetensors_file_is_told(tmp_path, data):
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(TrainingError, match=r"is no safetensors file .*become one by `loupe import-weights`"):
        open_weights(str(tmp_path / "x.bin"))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    save_file({"a": torch.tensor([1.0, torch.inf])}, tmp_path / "x.safetensors")
    with pytest.raises(TrainingError, match=r"numbers that are not finite \(in a\)"):
        open_weights(str(tmp_path / "x.safetensors"))


def test_a_schedule_without_phases_needs_weights(tiny_language_model_folder):
    with pytest.raises(SpecError, match=r"the schedule has no phases, and without connector\.weights there is nothing to evaluate"):
        tiny_training_spec(tiny_language_model_folder, schedule=NOTHING)
    one, two = (tiny_training_spec(tiny_language_model_folder, schedule=NOTHING, initial_weights_sha256=digit * 64) for digit in "12")
    assert fingerprint(one) != fingerprint(two)


# -- through a recipe


@pytest.fixture
def recipe(tmp_path, tiny_encoder_folder, tiny_language_model_folder):
    """A recipe that names weights and has no schedule; and the weights, of the recipe's connector."""
    text = tiny_recipe(tiny_encoder_folder, tiny_language_model_folder, seeds="[0]")
    path, weights = tmp_path / "tiny.toml", tmp_path / "given.safetensors"
    path.write_text(
        text.partition("[[schedule.align]]")[0].replace("[connector.global]", f'[connector]\nweights = "{weights}"\n\n[connector.global]')
    )
    encoder = describe_encoder(str(tiny_encoder_folder))
    given = build_connector(load_recipe(str(path)).recipe.connector_spec(encoder), encoder, hidden=TINY_HIDDEN, embedding_rms=0.5, seed=3)
    save_file(given.state_dict(), weights)
    return path


def opened(recipe, tmp_path):
    return open_experiment(load_recipe(str(recipe)), Store(str(tmp_path / "root")), ExecutionSettings(device="cpu", num_cpus=1))


def test_a_recipe_s_weights_are_identity_and_in_the_plan(recipe, tmp_path):
    experiment = opened(recipe, tmp_path)
    first = experiment.training(0)
    assert first.initial_weights_sha256 == experiment.weights.sha256
    facts = {(line.topic, line.fact): line.value for line in plan_lines(experiment)}
    assert facts["training", "starts from"] == f"{tmp_path}/given.safetensors (sha256 {experiment.weights.sha256[:16]})"
    assert facts["training", "phases"] == "none: the weights are evaluated and exported as they are"
    shutil.move(tmp_path / "given.safetensors", tmp_path / "moved.safetensors")
    recipe.write_text(recipe.read_text().replace("given.safetensors", "moved.safetensors"))
    assert fingerprint(opened(recipe, tmp_path).training(0)) == fingerprint(first)  # bytes are identity, places are not
    tensors = load_file(tmp_path / "moved.safetensors")
    save_file(tensors | {"gate.weight": tensors["gate.weight"] + 1}, tmp_path / "moved.safetensors")
    assert fingerprint(opened(recipe, tmp_path).training(0)) != fingerprint(first)


def test_a_recipe_whose_weights_do_not_fit_starts_nothing(recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace("queries = 4", "queries = 9"))
    with pytest.raises(RecipeError, match=r"recipe .*tiny\.toml: connector\.weights: .* is of another connector .*\n  compression\.queries"):
        opened(recipe, tmp_path)
    (tmp_path / "given.safetensors").unlink()
    message = r"recipe .*tiny\.toml: connector\.weights: .*given\.safetensors cannot be read \(.*\); give the path or URL of a connector\.safetensors"
    with pytest.raises(RecipeError, match=message):
        opened(recipe, tmp_path)
    assert not (tmp_path / "root").exists()


def test_a_plan_goes_on_without_the_weights(recipe, tmp_path):
    (tmp_path / "given.safetensors").unlink()
    experiment = open_experiment(load_recipe(str(recipe)), Store(str(tmp_path / "root")), ExecutionSettings(num_cpus=1), planning=True)
    facts = {(line.topic, line.fact): line.value for line in plan_lines(experiment)}
    given = f"{tmp_path}/given.safetensors"
    assert facts["training", "starts from"] == given
    assert facts["missing", f"weights {given}"].startswith("cannot be read, so they are unchecked (")
    keys = {fact: value for (topic, fact), value in facts.items() if topic == "stages"}
    assert keys["train-connector seed 0"] == f"key unknown without the weights {given}"
    assert keys["cache-features"].endswith("  to do")


def test_a_recipe_with_neither_weights_nor_phases_is_refused(recipe):
    recipe.write_text("\n".join(line for line in recipe.read_text().splitlines() if not line.startswith("weights")))
    with pytest.raises(RecipeError, match=r"schedule: found no phase; allowed: at least one, .* or connector\.weights, to evaluate and export"):
        load_recipe(str(recipe))


@pytest.mark.slow
def test_given_weights_are_evaluated_exported_and_reported_as_they_are(recipe, tmp_path):
    """Every stage of a recipe without phases: what comes out is what was given, and the page says that nothing was trained."""
    experiment = opened(recipe, tmp_path)
    records = {}
    for stage in stage_runs(experiment):
        records[stage.stage] = run_stage(experiment, stage, SilentProgress()).record
    given = load_file(tmp_path / "given.safetensors")
    exported = load_file(experiment.store.local_path(records["export"]["folder"]) / "connector.safetensors")
    assert given.keys() == exported.keys()
    assert all(torch.equal(given[name], exported[name]) for name in given)
    assert (records["train-connector"]["steps"], records["train-connector"]["phases"]) == (0, [])
    assert records["evaluate"]["num_questions"] > 0
    card = (experiment.store.local_path(records["export"]["folder"]) / "README.md").read_text()
    assert f"It starts from weights of sha256 `{experiment.weights.sha256}`." in card
    assert "Nothing was trained" in card
    assert experiment.store.exists(records["report"]["path"])


# -- from the authors' files to an answer


def one_step(*blocks, **more):
    """One alignment step of the connector's blocks and one of everything."""
    values = {"branch": BranchMix(both=1.0), "steps": 1, "batch_size": 4, "learning_rate": 1e-3}
    return ScheduleSpec(
        align=(PhaseSpec(name="align", train=blocks, **(values | more)),),
        sft=PhaseSpec(name="sft", train=(*blocks, "language_model"), **(values | more)),
    )


SINGLE = SingleSpec(layer=5)
SLIME = ConnectorSpec(
    global_branch=GlobalBranchSpec(fusion=SINGLE, adapters=GatedMixtureSpec(noise="authors")),
    local_branch=LocalBranchSpec(fusion=SINGLE, compression=CompressionSpec(queries=4)),
    standardise_inputs=False,
)
DENSE = ConnectorSpec(
    global_branch=GlobalBranchSpec(fusion=DCISpec(base=5, groups=((0, 2), (3, 5))), adapters=MLPSpec()), local_branch=None, standardise_inputs=False
)


def write_released(folder, spec):
    if spec is SLIME:
        return write_slime(folder, slime_modules(patches=16, queries=4, width=TINY_WIDTH, hidden=TINY_HIDDEN, table=torch.float16))
    return write_dense(folder, ReferenceProjector(3 * TINY_WIDTH, TINY_HIDDEN))


@pytest.fixture(scope="module")
def small_store(tmp_path_factory, tiny_encoder_folder, tiny_language_model_folder):
    root = tmp_path_factory.mktemp("imported") / "root"
    return build_small_store(str(root), tiny_encoder_folder, tiny_language_model_folder, schedule=tiny_schedule(steps=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("connector_spec", "schedule"),
    [
        (SLIME, one_step("global_mlp", "resampler", "gate", "compression")),
        (SLIME, NOTHING),
        (DENSE, one_step("global_mlp", branch=BranchMix(global_only=1.0))),
        (DENSE, NOTHING),
    ],
    ids=["slime trained", "slime as it is", "dense trained", "dense as it is"],
)
def test_an_imported_checkpoint_trains_answers_and_is_exported(small_store, tmp_path, connector_spec, schedule):
    store, spec = small_store
    execution = ExecutionSettings(device="cpu", num_cpus=1, checkpoint_every_steps=100, eval_batch_size=5)
    record = import_weights([write_released(tmp_path / "released", connector_spec)], connector_spec, spec.features.encoder, ViewSpec.slime(), store)
    file, imported = open_weights(store.url(record.connector))
    keep_weights(store, file)
    training = replace(spec, connector=connector_spec, schedule=schedule, initial_weights_sha256=file.sha256)
    for stage in ("align", "sft"):
        if schedule.phases:
            train_stage(training, store, execution, stage, threads=1)
    trained = train_connector(training, store, execution, SilentProgress())
    model = load_trained(training, store)
    changed = {name for name, tensor in model.connector.state_dict().items() if not torch.equal(tensor, imported[name])}
    if not schedule.phases:
        assert not changed
    else:
        first = store.read_json(f"runs/train-connector/{fingerprint(training)[:16]}/COMMITTED.json")["phases"][0]
        assert first["hashes_before"] != first["hashes_after"]
        assert {name.split(".")[0] for name in changed} == set(connector_spec.blocks)
        buffers = [name for name in changed if name.endswith(("_input.mean", "_input.scale")) or name == "token_scale"]
        assert not buffers  # nothing was measured in the import's place
        moved = max(float((model.connector.state_dict()[name] - imported[name]).abs().max()) for name in changed)
        assert moved < 1e-2  # two steps away from the import, not from random weights
    asked = EvaluationSpec(
        training_fingerprint=fingerprint(training),
        dataset_fingerprint=training.dataset_fingerprint,
        max_new_tokens=4,
        modes=("blind", "global") if connector_spec.local_branch is None else ("blind", "global", "local", "both"),
    )
    assert evaluate(asked, training, store, execution, SilentProgress()).num_questions > 0
    wanted = ExportSpec(training_fingerprint=fingerprint(training), evaluation_fingerprint=fingerprint(asked))
    exported = export(wanted, training, store, execution, SilentProgress())
    assert json.loads((store.local_path(exported.folder) / "loupe_config.json").read_text())["connector"]["standardise_inputs"] is False
    assert trained.parameters["global_mlp"] == sum(tensor.numel() for name, tensor in imported.items() if name.startswith("global_mlp."))
