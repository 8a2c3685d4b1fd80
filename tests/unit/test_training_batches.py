import gc
import itertools
import re
import threading
from dataclasses import replace

import pytest
import torch

from model.chat import Conversation
from model.connector import build_connector
from model.errors import SpecError
from model.specs import BranchMix, CompressionSpec, PhaseSpec, ScheduleSpec
from model.views import plan_views
from tests.tiny_training import FakeFeatures, fake_samples, tiny_schedule, tiny_training_spec
from workers.errors import MissingFeaturesError, TrainingError
from workers.training import batches
from workers.training.batches import BatchBuilder, Prefetcher, branch_mode, sample_index


def make_builder(tiny_language_model_folder, tiny_tokenizer, *, samples=None, substitutes=False, **changes):
    spec = tiny_training_spec(tiny_language_model_folder, **changes)
    connector = build_connector(spec.connector, spec.features.encoder, hidden=16, embedding_rms=1.0, seed=0)
    source = FakeFeatures(spec)
    builder = BatchBuilder(
        samples=fake_samples() if samples is None else samples,
        source=source,
        features=spec.features,
        connector=connector,
        schedule=spec.schedule,
        tokenizer=tiny_tokenizer,
        max_tokens=2048,
        substitutes=substitutes,
    )
    return builder, source


def test_every_pass_sees_every_sample_once_in_another_order():
    passes = [[sample_index(3, epoch * 10 + k, 10) for k in range(10)] for epoch in range(3)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] == [sample_index(3, k, 10) for k in range(10)]
    assert passes[0] != [sample_index(4, k, 10) for k in range(10)]


def test_branches_come_in_their_shares_and_depend_on_the_position_alone():
    mix = BranchMix(both=0.5, global_only=0.3, local_only=0.2)
    modes = [branch_mode(mix, 0, 1, position) for position in range(3000)]
    assert modes == [branch_mode(mix, 0, 1, position) for position in range(3000)]
    assert modes.count("both") / 3000 == pytest.approx(0.5, abs=0.04)
    assert modes.count("global") / 3000 == pytest.approx(0.3, abs=0.04)
    assert modes.count("blind") == 0
    assert branch_mode(BranchMix(blind=1.0), 0, 0, 5) == "blind"


def equal(one, two):
    assert torch.equal(one.text_ids, two.text_ids)
    assert torch.equal(one.gather, two.gather)
    assert torch.equal(one.label_positions, two.label_positions)
    for maps in ("global_maps", "local_maps"):
        a, b = getattr(one, maps), getattr(two, maps)
        assert (a is None) == (b is None)
        assert a is None or all(torch.equal(a[name].dense(), b[name].dense()) for name in a)
    assert (one.gate_noise is None) == (two.gate_noise is None)
    assert one.gate_noise is None or torch.equal(one.gate_noise, two.gate_noise)


def test_two_ranks_see_what_one_rank_sees_in_two_micro_batches(tiny_language_model_folder, tiny_tokenizer):
    builder, _ = make_builder(tiny_language_model_folder, tiny_tokenizer)
    for phase, step in itertools.product(range(5), range(3)):
        alone = builder.build(phase, step, micro_batch_size=2)
        ranks = [builder.build(phase, step, rank=rank, world=2) for rank in range(2)]
        assert len(alone.micro_batches) == 2
        for rank in range(2):
            assert ranks[rank].supervised == alone.supervised
            equal(ranks[rank].micro_batches[0], alone.micro_batches[rank])
        assert alone.supervised == sum(len(batch.label_ids) for batch in alone.micro_batches)


def test_only_what_a_phase_looks_at_is_fetched(tiny_language_model_folder, tiny_tokenizer):
    builder, source = make_builder(tiny_language_model_folder, tiny_tokenizer)
    builder.build(0, 0)
    builder.build(2, 0)
    assert source.asked == [{"global": 4}, {"local": 4}]


def test_noise_is_drawn_where_the_gate_trains(tiny_language_model_folder, tiny_tokenizer):
    builder, _ = make_builder(tiny_language_model_folder, tiny_tokenizer)
    assert builder.build(3, 0).micro_batches[0].gate_noise is None
    noises = [builder.build(4, step).micro_batches[0].gate_noise for step in range(2)]
    assert noises[0].shape[1:] == (16, 2)
    assert noises[0].shape != noises[1].shape or not torch.equal(*noises)
    assert [builder.build(phase, 0).micro_batches[0].experts for phase in range(3)] == ["mlp", "resampler", "mixture"]


def test_a_batch_that_cannot_be_shared_is_refused(tiny_language_model_folder, tiny_tokenizer):
    builder, _ = make_builder(tiny_language_model_folder, tiny_tokenizer)
    with pytest.raises(TrainingError, match="batch_size 4, which 3 workers"):
        builder.build(0, 0, world=3)


def test_every_phase_writes_in_its_own_template(tiny_language_model_folder, tiny_tokenizer):
    schedule = tiny_schedule()
    align = (replace(schedule.align[0], template="plain"), *schedule.align[1:])
    schedule = replace(schedule, align=align, sft=replace(schedule.sft, template="vicuna_v1"))
    samples = [replace(sample, turns=sample.turns[:1]) for sample in fake_samples()]
    builder, _ = make_builder(tiny_language_model_folder, tiny_tokenizer, samples=samples, schedule=schedule)
    texts = [tiny_tokenizer.decode(builder.build(phase, 0, micro_batch_size=1).micro_batches[0].text_ids) for phase in (0, 1, 4)]
    assert re.fullmatch(r"<\|begin\|>\d+\n", texts[0])
    assert re.fullmatch(r"<\|user\|>\nWhich number\?<\|end\|><\|assistant\|>\d+<\|end\|>", texts[1])
    assert re.fullmatch(r"<\|begin\|>A chat .* USER: \nWhich number\? ASSISTANT: \d+<\|end\|>", texts[2], re.DOTALL)
    labels = builder.build(0, 0).micro_batches[0].label_ids
    assert re.fullmatch(r"(\d+\n){4}", tiny_tokenizer.decode(labels))


def test_a_conversation_that_screening_should_have_left_out_is_named(tiny_language_model_folder, tiny_tokenizer):
    samples = fake_samples()
    samples[5] = replace(samples[5], turns=(replace(samples[5].turns[0], question="<image>"),))
    builder, _ = make_builder(tiny_language_model_folder, tiny_tokenizer, samples=samples)
    with pytest.raises(TrainingError, match=r"sample fake-5 \(fake\) cannot be trained on: the question of turn 1"):
        builder.conversation(5, "own")


def test_what_is_made_of_samples_does_not_pile_up_and_is_counted_once(tiny_language_model_folder, tiny_tokenizer, monkeypatch):
    """A long run holds few conversations; later passes tokenise a rank's own share alone, and give the batches that are given where all are kept."""
    boxed = [(sample, tuple(replace(turn, evidence=(8.0, 8.0, 40.0, 40.0), shown=("7",)) for turn in sample.turns)) for sample in fake_samples(40)]
    samples = [replace(sample, turns=turns) for sample, turns in boxed]
    schedule = tiny_schedule(steps=30)
    schedule = replace(schedule, align=(), sft=replace(schedule.sft, evidence_weight=1.0))
    roomy, _ = make_builder(tiny_language_model_folder, tiny_tokenizer, samples=samples, schedule=schedule)
    whole = [roomy.build(0, step, rank=1, world=2) for step in range(30)]
    tokens = [roomy.conversation(index, "own").num_text_tokens for index in range(40)]
    del roomy

    made = []
    tokenise = batches.sample_conversation
    monkeypatch.setattr(batches, "sample_conversation", lambda sample, *rest: made.append(sample.index) or tokenise(sample, *rest))
    monkeypatch.setattr(batches, "_KEPT_NUMBERS", 5 * max(tokens), raising=False)
    gc.collect()
    before = num_conversations()
    builder, _ = make_builder(tiny_language_model_folder, tiny_tokenizer, samples=samples, schedule=schedule)
    for step, expected in enumerate(whole):
        if step == 10:
            assert set(made) == set(range(40))
            made.clear()
        found = builder.build(0, step, rank=1, world=2)
        assert (found.supervised, found.micro_batches[0].evidence_scale) == (expected.supervised, expected.micro_batches[0].evidence_scale)
        equal(found.micro_batches[0], expected.micro_batches[0])
        for name in ("evidence_places", "evidence_words"):
            one, other = getattr(found.micro_batches[0], name), getattr(expected.micro_batches[0], name)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    assert num_conversations() - before <= 5 * max(tokens) / min(tokens) < 40
    assert set(made) <= {index for step in range(10, 30) for index in builder._indices(0, step)[2:]}
    assert len(made) > 30  # those of 20 steps, but for the few that were still there


def num_conversations():
    return sum(type(item) is Conversation for item in gc.get_objects())


def test_no_samples_no_training(tiny_language_model_folder, tiny_tokenizer):
    with pytest.raises(TrainingError, match="no image"):
        make_builder(tiny_language_model_folder, tiny_tokenizer, samples=[])


def test_the_spec_s_parts_must_fit(tiny_language_model_folder):
    spec = tiny_training_spec(tiny_language_model_folder)
    with pytest.raises(SpecError, match=r"template plain leaves out what is asked.*found both 0, global 0.5, local 0, blind 0.5"):
        replace(tiny_schedule().align[0], template="plain", branch=BranchMix(global_only=0.5, blind=0.5))
    phase = PhaseSpec(name="p", train=("local_mlp",), branch=BranchMix(both=1.0), steps=1, batch_size=1, learning_rate=1.0)
    with pytest.raises(SpecError, match=r"trains \['local_mlp'\]"):
        tiny_training_spec(tiny_language_model_folder, schedule=ScheduleSpec(align=(phase,), sft=None))
    with pytest.raises(SpecError, match="different datasets"):
        tiny_training_spec(tiny_language_model_folder, dataset_fingerprint="e" * 64)
    with pytest.raises(SpecError, match=r"needs the maps \['mean_0_2'\]"):
        replace(spec, features=replace(spec.features, local_maps=(spec.features.local_maps[0], spec.features.local_maps[2])))
    with pytest.raises(SpecError, match="no local branch"):
        replace(
            spec, connector=replace(spec.connector, local_branch=None), schedule=replace(tiny_schedule(), align=tiny_schedule().align[3:], sft=None)
        )


def test_prefetched_items_come_in_order_and_errors_where_items_would():
    def make():
        yield from range(5)
        raise KeyError("six")

    prefetcher = Prefetcher(make)
    items = iter(prefetcher)
    assert [next(items) for _ in range(5)] == list(range(5))
    with pytest.raises(KeyError, match="six"):
        next(items)
    prefetcher.close()


def test_a_prefetcher_can_be_left_early():
    before = threading.active_count()
    prefetcher = Prefetcher(lambda: iter(itertools.count()))
    assert next(iter(prefetcher)) == 0
    prefetcher.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(("queries", "rows", "columns"), [(1, 1, 1), (4, 2, 2), (6, 2, 3), (3, 1, 3)])
def test_evidence_lands_on_the_local_token_that_shows_it(queries, rows, columns, tiny_language_model_folder, tiny_tokenizer):
    spec = tiny_training_spec(tiny_language_model_folder).connector
    spec = replace(spec, local_branch=replace(spec.local_branch, compression=CompressionSpec(queries=queries)))
    builder, _ = make_builder(tiny_language_model_folder, tiny_tokenizer, connector=spec)
    assert builder.connector.tokens_per_local_view == queries
    sample = builder.samples[0]
    plan = plan_views(sample.width_px, sample.height_px, builder.features.encoder.view_px, builder.features.views)
    view = plan.local_views[-1]
    middle_x, middle_y = (view.source.left + view.source.right) / 2, (view.source.top + view.source.bottom) / 2
    turn = replace(sample.turns[0], evidence=(middle_x - 0.2, middle_y - 0.2, middle_x + 0.1, middle_y + 0.1), shown=("7",))
    builder.samples[0] = replace(sample, turns=(turn, turn))
    words = set(tiny_tokenizer.encode(" 7", add_special_tokens=False))
    pairs = builder.evidence(0)
    row, column = ((cells - 1) // 2 for cells in (rows, columns))  # the one that holds the middle, or ends there: the box is a little before it
    assert {place for place, _ in pairs} == {(len(plan.local_views) - 1) * queries + row * columns + column}
    assert {word for _, word in pairs} == words
    assert len(pairs) == len(words)  # asked twice, meant once


def test_phases_over_some_sources_see_those_alone_and_every_one_as_often(tiny_language_model_folder, tiny_tokenizer):
    """Two phases share the captions and pass on where the first stopped; a phase over everything in between does not move them."""
    samples = [replace(sample, source="llava_json/captions" if k % 3 else "llava_json/chat") for k, sample in enumerate(fake_samples(12))]
    captions = [k for k in range(12) if k % 3]

    def phase(name, sources, steps):
        values = {"train": ("global_mlp",), "branch": BranchMix(global_only=1.0), "batch_size": 2, "learning_rate": 1e-3}
        return PhaseSpec(name=name, sources=sources, steps=steps, **values)

    only = ("llava_json/captions",)
    schedule = ScheduleSpec(align=(phase("a", only, 3), phase("b", (), 2), phase("c", only, 1), phase("d", ("llava_json/chat",), 4)), sft=None)
    builder, _ = make_builder(tiny_language_model_folder, tiny_tokenizer, samples=samples, schedule=schedule)
    seen = [[index for step in range(p.steps) for index in builder._indices(k, step)] for k, p in enumerate(schedule.align)]
    assert sorted(seen[0] + seen[2]) == captions
    assert len(set(seen[1])) == 4
    assert sorted(seen[3]) == sorted([0, 3, 6, 9] * 2)
    with pytest.raises(TrainingError, match=r"phase 'x' sees the sources llava_json/none alone.*found those of llava_json/captions, llava_json/chat"):
        make_builder(
            tiny_language_model_folder,
            tiny_tokenizer,
            samples=samples,
            schedule=ScheduleSpec(align=(phase("x", ("llava_json/none",), 1),), sft=None),
        )


def test_the_selector_s_noise_is_a_function_of_the_position(tiny_language_model_folder, tiny_tokenizer):
    from model.specs import TextGuidedSelectorSpec
    from tests.tiny_training import tiny_connector_spec

    plain = tiny_connector_spec()
    connector = replace(plain, local_branch=replace(plain.local_branch, selector=TextGuidedSelectorSpec(top_p=0.7)))
    schedule = tiny_schedule()
    schedule = replace(schedule, align=(), sft=replace(schedule.sft, selector=True, branch=BranchMix(both=1.0)))
    builder, _ = make_builder(tiny_language_model_folder, tiny_tokenizer, connector=connector, schedule=schedule)
    whole = builder.build(0, 1).micro_batches[0]
    assert whole.selects
    assert whole.selector_noise.shape == (
        4,
        max(len(order) for order in [builder.connector.local_order(builder.view_plan(s)) for s in builder.samples]),
    )
    parts = [builder.build(0, 1, rank=rank, world=2).micro_batches[0].selector_noise for rank in range(2)]
    for row in range(4):
        part = parts[row // 2][row % 2]
        assert torch.equal(whole.selector_noise[row, : len(part)], part)
    assert not torch.equal(whole.selector_noise, builder.build(0, 0).micro_batches[0].selector_noise)
    off = replace(schedule, sft=replace(schedule.sft, selector=False))
    builder, _ = make_builder(tiny_language_model_folder, tiny_tokenizer, connector=connector, schedule=off)
    assert not builder.build(0, 0).micro_batches[0].selects


def test_an_image_without_features_gives_way_to_the_next_one_and_the_steps_go_on_as_planned(tiny_language_model_folder, tiny_tokenizer):
    """Whatever was found out before: a run that resumes, and so knows of nothing yet, sees what the first one saw."""
    builder, _ = make_builder(tiny_language_model_folder, tiny_tokenizer)
    planned = [builder.build(2, step) for step in range(6)]
    images = [sample.image_sha256 for sample in builder.samples]
    gone = {images[2], images[3], images[-1]}
    strict, source = make_builder(tiny_language_model_folder, tiny_tokenizer)
    source.missing = gone
    affected = next(step for step in range(6) if {2, 3, len(images) - 1} & set(builder._indices(2, step)))
    with pytest.raises(MissingFeaturesError) as caught:
        strict.build(2, affected)
    assert caught.value.image_sha256 in gone

    def lenient(steps):
        made, source = make_builder(tiny_language_model_folder, tiny_tokenizer, substitutes=True)
        source.missing = gone
        return {step: made.build(2, step, micro_batch_size=2) for step in steps}

    forward, backward = lenient(range(6)), lenient(reversed(range(6)))
    stand_ins = {2: 4, 3: 4, len(images) - 1: 0}
    for step, before in enumerate(planned):
        indices = builder._indices(2, step)
        assert forward[step].supervised == before.supervised
        assert forward[step].num_missing == sum(index in stand_ins for index in indices)
        for one, other in zip(forward[step].micro_batches, backward[step].micro_batches, strict=True):
            equal(one, other)
    assert sum(batches.num_missing for batches in forward.values()) > 0

    everything, source = make_builder(tiny_language_model_folder, tiny_tokenizer, substitutes=True)
    source.missing = set(images)
    with pytest.raises(MissingFeaturesError, match="sees no image any more"):
        everything.build(2, 0)
