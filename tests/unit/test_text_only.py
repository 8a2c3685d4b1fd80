"""Samples without an image, from the batch to the trained run: who sees them, what they are shown as, and that ranks and kills change nothing."""

import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.connector import build_connector
from model.errors import ConversationError
from model.specs import BranchMix, PhaseSpec, ScheduleSpec, fingerprint
from tests import small_data
from tests.ranks import ENGINES, fine_tune, ranks_of
from tests.tiny_training import FakeFeatures, build_small_store, fake_samples, mixed_samples, tiny_schedule, tiny_training_spec
from workers.caching.build import cache_features
from workers.dataset.samples import read_samples
from workers.errors import TrainingError
from workers.evaluation import EvaluationSpec, asked_features, check_other_dataset, evaluate
from workers.execution import ExecutionSettings, SilentProgress
from workers.quarantine import read_quarantine
from workers.runtime import InlineCluster
from workers.storage import Store
from workers.training.assemble import assemble_model
from workers.training.batches import BatchBuilder
from workers.training.run import train_connector, train_stage
from workers.training.screening import refusals

EXECUTION = ExecutionSettings(device="cpu", num_cpus=1, checkpoint_every_steps=2, eval_batch_size=5)


def phase(name="p", train=("language_model",), **changes):
    values = {"branch": BranchMix(both=1.0), "steps": 3, "batch_size": 4, "learning_rate": 1e-3}
    return PhaseSpec(name=name, train=train, **(values | changes))


def make_builder(spec, tokenizer, samples):
    connector = build_connector(spec.connector, spec.features.encoder, hidden=16, embedding_rms=1.0, seed=0)
    return BatchBuilder(
        samples=samples,
        source=FakeFeatures(spec),
        features=spec.features,
        connector=connector,
        schedule=spec.schedule,
        tokenizer=tokenizer,
        max_tokens=2048,
    )


@pytest.fixture(scope="module")
def spec(tiny_language_model_folder):
    return tiny_training_spec(tiny_language_model_folder)


def phases_indices(builder):
    return [[index for step in range(p.steps) for index in builder._indices(number, step)] for number, p in enumerate(builder.schedule.phases)]


# -- who sees them


@pytest.mark.parametrize(
    ("train", "template", "sees"),
    [
        (("language_model",), "own", True),
        (("global_mlp", "language_model"), "vicuna_v1", True),
        (("global_mlp", "language_model"), "plain", False),
        (("global_mlp", "compression"), "own", False),
    ],
)
def test_phases_that_train_the_language_model_see_text_alone_and_no_others(train, template, sees):
    one = phase(train=train, template=template)
    assert one.sees_text_only is sees
    assert one.sees("a", text_only=False)
    assert one.sees("a", text_only=True) is sees
    assert not replace(one, sources=("b",)).sees("a", text_only=False)


def test_alignment_passes_over_the_images_as_if_nothing_else_were_there(spec, tiny_tokenizer):
    """The same images in the same order, step by step, as in a dataset of which the text is taken out."""
    samples = mixed_samples()
    both = make_builder(spec, tiny_tokenizer, samples)
    alone = make_builder(spec, tiny_tokenizer, [sample for sample in samples if not sample.text_only])
    for number in range(len(spec.schedule.align)):
        for step in range(3):
            seen = [[builder.samples[index].sample_id for index in builder._indices(number, step)] for builder in (both, alone)]
            assert seen[0] == seen[1]
            one, two = (builder.build(number, step).micro_batches[0] for builder in (both, alone))
            assert torch.equal(one.gather, two.gather)
            assert torch.equal(one.text_ids, two.text_ids)
    assert {both.samples[index].text_only for index in phases_indices(both)[4]} == {False, True}


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.tuples(st.booleans(), st.sampled_from("ab")), min_size=1, max_size=14),
    phases=st.lists(st.tuples(st.sampled_from([(), ("a",), ("b",), ("a", "b")]), st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=5),
    tunes=st.booleans(),
    seed=st.integers(0, 5),
)
def test_every_sample_that_a_phase_sees_is_seen_as_often_as_any_other(tiny_training, kinds, phases, tunes, seed):
    """Against a reference in plain loops: phases that see the same samples share one endless list of passes, and cut it where they stand."""
    spec, tokenizer = tiny_training
    samples = [
        replace(sample, source=source, image=None if text_only else sample.image)
        for sample, (text_only, source) in zip(fake_samples(len(kinds)), kinds, strict=True)
    ]
    made = [
        phase(f"p{number}", ("global_mlp",), sources=sources, steps=steps, batch_size=size) for number, (sources, steps, size) in enumerate(phases)
    ]
    if tunes:
        made[-1] = replace(made[-1], train=("language_model",))
    spec = replace(spec, schedule=ScheduleSpec(align=tuple(made[: len(made) - tunes]), sft=made[-1] if tunes else None, seed=seed))
    shown = {
        one.name: [
            k for k, (text_only, source) in enumerate(kinds) if (not one.sources or source in one.sources) and (one.sees_text_only or not text_only)
        ]
        for one in made
    }
    if all(text_only for text_only, _ in kinds) or not all(shown.values()):
        with pytest.raises(TrainingError, match="no image"):
            make_builder(spec, tokenizer, samples)
        return
    builder = make_builder(spec, tokenizer, samples)
    streams = {}
    for one, indices in zip(made, phases_indices(builder), strict=True):
        assert set(indices) <= set(shown[one.name])
        streams.setdefault((one.sources, one.sees_text_only), (shown[one.name], []))[1].extend(indices)
    for wanted, stream in streams.values():
        for start in range(0, len(stream), len(wanted)):
            one_pass = stream[start : start + len(wanted)]
            assert len(set(one_pass)) == len(one_pass)
            assert len(one_pass) < len(wanted) or sorted(one_pass) == wanted


@pytest.fixture(scope="session")
def tiny_training(tiny_language_model_folder, tiny_tokenizer):
    return tiny_training_spec(tiny_language_model_folder), tiny_tokenizer


def test_a_phase_that_would_see_text_alone_and_cannot_is_refused(spec, tiny_tokenizer):
    samples = [replace(sample, source="chat" if sample.text_only else "pictures") for sample in mixed_samples()]
    aligns = replace(spec, schedule=ScheduleSpec(align=(phase("a", ("global_mlp",), sources=("chat",)),), sft=None, seed=0))
    with pytest.raises(
        TrainingError, match=r"phase 'a' sees the sources chat alone, of which the train split holds no image; found those of pictures"
    ):
        make_builder(aligns, tiny_tokenizer, samples)
    tunes = replace(spec, schedule=ScheduleSpec(align=(), sft=phase("b", sources=("chat",)), seed=0))
    assert {samples[index].text_only for index in phases_indices(make_builder(tunes, tiny_tokenizer, samples))[0]} == {True}
    with pytest.raises(TrainingError, match="holds no image"):
        make_builder(tunes, tiny_tokenizer, [sample for sample in samples if sample.text_only])


# -- what they are shown as


def sequences(builder, batch):
    """Every sequence of a batch as text, with <v> for a visual row."""
    found = []
    num_text = len(batch.text_ids)
    for row, length in zip(batch.gather.tolist(), batch.lengths.tolist(), strict=True):
        pieces = ["<v>" if not 3 <= place < 3 + num_text else builder._tokenizer.decode([int(batch.text_ids[place - 3])]) for place in row[:length]]
        found.append("".join(pieces))
    return found


def test_text_alone_is_blind_and_has_no_image_s_place_whatever_the_mix(spec, tiny_tokenizer):
    samples = mixed_samples()
    for mix in (BranchMix(both=1.0), BranchMix(global_only=1.0), BranchMix(local_only=1.0), BranchMix(both=0.5, blind=0.5)):
        schedule = ScheduleSpec(align=(), sft=phase(branch=mix, steps=6), seed=0)
        builder = make_builder(replace(spec, schedule=schedule), tiny_tokenizer, samples)
        seen = set()
        for step in range(6):
            indices = builder._indices(0, step)
            for index, text in zip(indices, sequences(builder, builder.build(0, step).micro_batches[0]), strict=True):
                sample = samples[index]
                seen.add(sample.text_only)
                said = "".join(f"<|user|>{turn.question}<|end|><|assistant|>{turn.answer}<|end|>" for turn in sample.turns)
                if sample.text_only:
                    assert text == said
                else:
                    assert text.replace("<v>", "") == said.replace("<|user|>", "<|user|>\n", 1)
                    assert ("<v>" in text) or mix.blind
        assert seen == {False, True}


def test_nothing_is_fetched_of_text_alone(spec, tiny_tokenizer):
    builder = make_builder(replace(spec, schedule=ScheduleSpec(align=(), sft=phase(steps=6), seed=0)), tiny_tokenizer, mixed_samples())
    for step in range(6):
        builder.source.asked.clear()
        builder.build(0, step)
        num_images = sum(not builder.samples[index].text_only for index in builder._indices(0, step))
        assert builder.source.asked == ([{"global": num_images, "local": num_images}] if num_images else [])
    maps, _ = builder.measuring_maps(64)
    assert {len(packed.dense()) for packed in maps.values()} == {12}


def test_what_is_said_without_an_image_is_supervised_as_with_one(tiny_tokenizer):
    from model.chat import tokenise_conversation

    turns = [("Hello?", "Hi."), ("And?", "No.")]
    alone = tokenise_conversation(tiny_tokenizer, turns, 2048, has_image=False)
    assert alone.before == ()
    learned = tiny_tokenizer.decode([token for token, wanted in zip(alone.after, alone.supervised, strict=True) if wanted])
    assert learned == "Hi.<|end|>No.<|end|>"
    assert tiny_tokenizer.decode(alone.after) == "<|user|>Hello?<|end|><|assistant|>Hi.<|end|><|user|>And?<|end|><|assistant|>No.<|end|>"
    assert tokenise_conversation(tiny_tokenizer, turns, len(alone.after) - 1, has_image=False).turns_kept == 1
    with pytest.raises(ConversationError, match="holds '<image>'"):
        tokenise_conversation(tiny_tokenizer, [("See <image>?", "Yes.")], 2048, has_image=False)


def test_text_alone_has_all_the_room_and_is_asked_for_its_own_phases_templates_alone(spec, tiny_tokenizer):
    """Turns that `plain` refuses, and a length that leaves no room beside an image, are no fault of text that neither concerns."""
    from model.chat import with_template

    tokenizers = {template: with_template(tiny_tokenizer, template) for template in ("own", "plain")}
    phases = [phase("align", ("global_mlp",), template="plain"), phase("sft")]
    connector = build_connector(spec.connector, spec.features.encoder, hidden=1, embedding_rms=1.0, seed=0)
    samples = mixed_samples()
    rows = list(refusals(samples, phases, tokenizers, spec.features, connector, 2048))
    assert {row.index for row in rows} == {sample.index for sample in samples if len(sample.turns) > 1 and not sample.text_only}
    assert {row.reason for row in rows} == {"conversation_template"}
    short = list(refusals(samples, phases[1:], tokenizers, spec.features, connector, 42))
    assert {row.index for row in short} == {sample.index for sample in samples if not sample.text_only}
    assert {row.reason for row in short} == {"conversation_too_long"}


def test_a_text_s_loss_is_the_language_model_s_own(spec, tiny_language_model_folder):
    """Against transformers' loss on the same text, whatever stands beside it in the batch."""
    tuned = replace(spec, schedule=ScheduleSpec(align=(), sft=phase(steps=6), seed=0))
    model = assemble_model(tuned, freeze_language_model=True)
    samples = mixed_samples()
    builder = BatchBuilder(
        samples=samples,
        source=FakeFeatures(tuned),
        features=tuned.features,
        connector=model.connector,
        schedule=tuned.schedule,
        tokenizer=model.tokenizer,
        max_tokens=2048,
    )
    checked = 0
    with torch.no_grad():
        for step in range(6):
            whole = float(model(builder.build(0, step).micro_batches[0])[1])
            parts = builder.build(0, step, micro_batch_size=1).micro_batches
            alone = [float(model(part)[1]) for part in parts]
            assert whole == pytest.approx(sum(alone), rel=1e-5)
            for index, loss in zip(builder._indices(0, step), alone, strict=True):
                if not samples[index].text_only:
                    continue
                ids, labels = [], []
                for turn in samples[index].turns:
                    for text, learned in ((f"<|user|>{turn.question}<|end|><|assistant|>", False), (f"{turn.answer}<|end|>", True)):
                        some = model.tokenizer.encode(text, add_special_tokens=False)
                        ids += some
                        labels += some if learned else [-100] * len(some)
                wanted = model.language_model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
                assert loss == pytest.approx(float(wanted) * sum(label != -100 for label in labels), rel=1e-5)
                checked += 1
    assert checked >= 6


def test_evidence_weighs_the_same_beside_text_alone(spec, tiny_tokenizer):
    """The evidence loss is shared out over the pairs that are there; text has none."""
    samples = [
        sample
        if sample.text_only
        else replace(
            sample, turns=tuple(replace(turn, evidence=(0.0, 0.0, sample.width_px / 2, sample.height_px / 2), shown=("a",)) for turn in sample.turns)
        )
        for sample in mixed_samples()
    ]
    tuned = replace(spec, schedule=ScheduleSpec(align=(), sft=phase(train=("compression", "language_model"), evidence_weight=2.0, steps=6), seed=0))
    builder = make_builder(tuned, tiny_tokenizer, samples)
    mixed = 0
    for step in range(6):
        indices = builder._indices(0, step)
        batches = builder.build(0, step)
        num_pairs = sum(len(builder.evidence(index)) for index in indices)
        mixed += len({samples[index].text_only for index in indices}) == 2
        assert all(not builder.evidence(index) for index in indices if samples[index].text_only)
        batch = batches.micro_batches[0]
        assert batch.evidence_scale == pytest.approx(2.0 * batches.supervised / max(num_pairs, 1))
        assert (0 if batch.evidence_places is None else len(batch.evidence_places)) == num_pairs
    assert mixed


# -- ranks


def seed_of_lopsided_steps(samples, schedule):
    """A seed for which once the first rank, once the second has text alone, and the other has an image."""
    from workers.training.batches import sample_index

    for seed in range(100):
        steps = [[samples[sample_index(seed, 4 * step + k, len(samples))].text_only for k in range(4)] for step in range(schedule.sft.steps)]
        if any(all(row[:2]) and not all(row[2:]) for row in steps) and any(all(row[2:]) and not all(row[:2]) for row in steps):
            return seed
    raise AssertionError("no such seed")


@pytest.fixture(scope="module")
def lopsided(tiny_language_model_folder, tmp_path_factory):
    """A fine-tuning run of which some steps give a rank nothing but text; and its losses in one process on the twin."""
    schedule = replace(tiny_schedule(steps=6), align=())
    schedule = replace(schedule, seed=seed_of_lopsided_steps(mixed_samples(), schedule))
    spec = tiny_training_spec(tiny_language_model_folder, schedule=schedule)
    return spec, fine_tune(spec, str(tmp_path_factory.mktemp("alone")), engine="torch", samples="mixed", micro_batch_size=None)


def test_losses_do_not_depend_on_micro_batches_of_text_alone(lopsided, tmp_path):
    spec, expected = lopsided
    found = fine_tune(spec, str(tmp_path), engine="torch", samples="mixed")
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_come_in_one_order_whatever_a_batch_reaches(spec, device):
    """What ZeRO needs of every rank, and blank views give. Without them the order differs, or gradients are missing: shown as well."""
    mix = BranchMix(both=0.25, global_only=0.25, local_only=0.25, blind=0.25)
    tuned = replace(spec, schedule=replace(spec.schedule, align=(), sft=replace(spec.schedule.sft, steps=8, branch=mix)))
    model = assemble_model(tuned, freeze_language_model=False, device=device)
    names = [name for name, _ in model.named_parameters() if name.startswith("connector.")]
    samples = mixed_samples()
    builder = make_builder(tuned, model.tokenizer, samples)
    batches = {}
    for step in range(8):
        for batch, index in zip(builder.build(0, step, micro_batch_size=1).micro_batches, builder._indices(0, step), strict=True):
            shown = (samples[index].text_only, batch.global_maps is not None, batch.local_maps is not None)
            batches.setdefault(shown, batch.to(device))
    assert len(batches) == 5  # text alone, and an image in every mode
    come: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: come.append(name))

    def order(batch, *, every_block):
        come.clear()
        model.runs_every_block = every_block
        model(batch)[0].backward()
        return tuple(come)

    (found,) = {order(batch, every_block=True) for batch in batches.values()}
    assert sorted(found) == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert set(found[-len(names) :]) == set(names)
    assert len({order(batch, every_block=False) for batch in batches.values()}) == 4  # text alone and blind are alike


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    with ranks_of(tmp_path_factory.mktemp("ranks"), 2) as groups:
        yield groups[2]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_losses_do_not_depend_on_the_number_of_ranks(lopsided, two_ranks, engine):
    """On ZeRO, a rank without an image used to die, since it had fewer gradients to sum than its neighbour."""
    spec, expected = lopsided
    (found, _), _ = two_ranks.run(spec, engine=engine, samples="mixed", micro_batch_size=None)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)


# -- a whole run


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tiny_encoder_folder, tiny_language_model_folder):
    """A store over squares and a LLaVA file of which more than half is text, cached, nothing trained yet."""
    folder = tmp_path_factory.mktemp("mixed")
    images = {f"{number}.png": small_data.png(number, 112, 56) for number in range(6)}
    records = [{"image": name, "conversations": small_data.conversation("<image>\nWhat?", "noise")} for name in images]
    records += [{"conversations": small_data.conversation(f"Count to {number}.", " ".join(map(str, range(number))))} for number in range(1, 13)]
    records += [{"conversations": small_data.conversation("Is <|end|> the end?", "yes")}] * 2
    source = small_data.write_llava(folder / "llava", records, images)
    schedule = tiny_schedule(steps=2)
    schedule = replace(schedule, align=(replace(schedule.align[0], template="plain", sources=("llava_json/records",)), *schedule.align[1:]))
    store, spec = build_small_store(
        str(folder / "root"),
        tiny_encoder_folder,
        tiny_language_model_folder,
        num_images=12,
        more_sources=(source,),
        schedule=replace(schedule, sft=replace(schedule.sft, steps=6)),
    )
    return store, spec


def train(spec, store):
    for stage in ("align", "sft"):
        train_stage(spec, store, EXECUTION, stage, threads=1)
    return train_connector(spec, store, EXECUTION, SilentProgress())


@pytest.fixture(scope="module")
def trained(mixed, tmp_path_factory):
    root = shutil.copytree(mixed[0].local_path(), tmp_path_factory.mktemp("trained") / "root")
    return Store(str(root)), mixed[1], train(mixed[1], Store(str(root)))


@pytest.mark.slow
def test_a_mixed_dataset_trains_both_stages(trained):
    store, spec, record = trained
    samples = read_samples(store, spec.dataset_fingerprint, "train")
    spoilt = [sample for sample in samples if "<|end|>" in sample.turns[0].question]
    assert record.num_text_only == sum(sample.text_only for sample in samples) - len(spoilt) > 0
    assert record.num_images == sum(not sample.text_only for sample in samples)
    assert record.quarantined_by_reason == ({"conversation_marks": 1} if spoilt else {})
    assert [row.index for row in read_quarantine(store, "train-connector", fingerprint(spec)[:16])] == [sample.index for sample in spoilt]
    assert [one.name for one in record.phases] == ["projector", "resampler", "compression", "projector-again", "tuning"]


@pytest.mark.slow
@pytest.mark.parametrize("kill_after", [3, 9, 12])
def test_a_killed_run_over_a_mixed_dataset_ends_in_the_same_bytes(mixed, trained, tmp_path, monkeypatch, kill_after):
    store = Store(str(shutil.copytree(mixed[0].local_path(), tmp_path / "root")))
    spec, left = mixed[1], [kill_after]
    build = BatchBuilder.build

    class Killed(BaseException):
        pass

    def dies(self, *arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return build(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(BatchBuilder, "build", dies)
        with pytest.raises(Killed):
            train(spec, store)
    record = train(spec, store)
    assert record.files == trained[2].files
    assert [one.hashes_after for one in record.phases] == [one.hashes_after for one in trained[2].phases]


@pytest.mark.slow
def test_held_out_text_is_counted_and_not_asked(trained):
    store, spec, _ = trained
    wanted = EvaluationSpec(training_fingerprint=fingerprint(spec), dataset_fingerprint=spec.dataset_fingerprint, max_new_tokens=3)
    record = evaluate(wanted, spec, store, EXECUTION, SilentProgress())
    samples = read_samples(store, spec.dataset_fingerprint, "held_out")
    alone = {sample.sample_id for sample in samples if sample.text_only}
    assert record.num_text_only == len(alone) > 0
    assert record.num_images == len(samples) - len(alone)
    assert record.num_questions == sum(len(sample.turns) for sample in samples if not sample.text_only)
    assert not {score.family for score in record.scores} & {"text"}
    assert not any(score.kind == "llava/text" for score in record.scores)
    rows = pq.read_table(store.local_path(record.answers)).to_pylist()
    assert {row["sample_id"] for row in rows} == {sample.sample_id for sample in samples} - alone


@pytest.mark.slow
def test_another_dataset_with_text_is_asked_about_its_images_alone(trained, mixed, tmp_path):
    """One of its pictures and one of its conversations are of the training split: the picture is left out, the conversation was never to be asked."""
    store, spec, _ = trained
    samples = read_samples(store, spec.dataset_fingerprint, "train")
    known = next(sample for sample in samples if not sample.text_only)
    said = next(sample for sample in samples if sample.text_only).turns[0]
    images = {"known.png": store.read_reference(known.image_path), "new.png": small_data.png(77, 112, 56)}
    records = [{"image": name, "conversations": small_data.conversation("What?", "noise")} for name in images]
    records += [{"conversations": small_data.conversation(*words)} for words in ((said.question, said.answer), ("New?", "yes"))]
    dataset = small_data.dataset_spec(
        sources=(small_data.write_llava(tmp_path / "llava", records, images),), held_out_fraction=1.0, views=spec.features.views
    )
    small_data.build(store, dataset)
    wanted = EvaluationSpec(training_fingerprint=fingerprint(spec), dataset_fingerprint=fingerprint(dataset), max_new_tokens=3)
    cache_features(asked_features(wanted, spec), store, EXECUTION, SilentProgress(), cluster=InlineCluster())
    check_other_dataset(wanted, spec, store, EXECUTION)
    record = evaluate(wanted, spec, store, EXECUTION, SilentProgress())
    assert (record.num_images, record.num_questions, record.num_images_trained_on, record.num_text_only) == (1, 1, 1, 2)
