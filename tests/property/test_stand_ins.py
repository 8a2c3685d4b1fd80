"""Which image stands in for one without features: a function of the position and of what is damaged, whoever asks and whatever was seen before."""

import random

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from model.connector import build_connector
from model.specs import BranchMix, PhaseSpec, ScheduleSpec
from tests.tiny_training import FakeFeatures, fake_samples, mixed_samples, tiny_training_spec
from workers.errors import MissingFeaturesError
from workers.training.batches import BatchBuilder, branch_mode

BATCH, STEPS = 4, 3
BRANCHES = {"blind": (), "global": ("global",), "local": ("local",), "both": ("global", "local")}


class DamagedFeatures(FakeFeatures):
    """Names any one of the branches that it lacks of what is asked for, as a reader with many reads in flight may."""

    def __init__(self, spec, damaged, seed):
        super().__init__(spec)
        self.damaged, self.luck = damaged, random.Random(seed)
        self.given = []

    def fetch(self, images):
        lacking = [(branch, s.image_sha256) for branch, some in images.items() for s in some if (branch, s.image_sha256) in self.damaged]
        if lacking:
            branch, digest = self.luck.choice(lacking)
            raise MissingFeaturesError(f"no {branch} features of {digest[:12]}", digest, branch)
        found = super().fetch(images)
        self.given.append({branch: [s.image_sha256 for s in images.get(branch, ())] for branch in ("global", "local")})
        return found


def mixes():
    """Shares of blind, global, local and both, of which something is shown."""
    return st.tuples(*[st.integers(0, 3)] * 4).filter(lambda shares: any(shares[1:]))


def branch_mix(shares):
    blind, global_only, local_only, both = (share / sum(shares) for share in shares)
    return BranchMix(blind=blind, global_only=global_only, local_only=local_only, both=both)


def expected_index(builder, phase, position, index, damaged):
    """The first sample from the planned one on, in the frozen order and round its end, of which everything that is shown is whole; with what is."""
    samples, spec = builder.samples, builder.schedule.phases[phase]
    shown = () if samples[index].text_only else BRANCHES[branch_mode(spec.branch, builder.schedule.seed, phase, position)]
    for k in range(len(samples)):
        other = (index + k) % len(samples)
        if not shown:
            return other, shown
        if not samples[other].text_only and not any((branch, samples[other].image_sha256) in damaged for branch in shown):
            return other, shown
    raise AssertionError("one image is always whole")


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mix=st.tuples(mixes(), mixes()),
    damage=st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)),
    seed=st.integers(0, 2**16),
    resume=st.integers(0, 2 * STEPS),
    worlds=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    text_only=st.booleans(),
)
@example(mix=((0, 0, 0, 1), (0, 1, 0, 0)), damage=(0.0, 0.6), seed=0, resume=STEPS, worlds=(1, 1), text_only=False)
def test_the_same_samples_at_the_same_positions(tiny_language_model_folder, tiny_tokenizer, mix, damage, seed, resume, worlds, text_only):
    """A run begun on some ranks and resumed on others sees what the damage alone says, in every branch; so do the connector's measured inputs."""
    shared = {"train": ("global_mlp",), "steps": STEPS, "batch_size": BATCH, "learning_rate": 1e-3}
    align, sft = (branch_mix(shares) for shares in mix)
    schedule = ScheduleSpec(
        align=(PhaseSpec(name="align", branch=align, **shared),),
        sft=PhaseSpec(name="sft", branch=sft, **(shared | {"train": ("global_mlp", "language_model"), "language_model_learning_rate": 1e-3})),
        seed=seed,
    )
    spec = tiny_training_spec(tiny_language_model_folder, schedule=schedule)
    connector = build_connector(spec.connector, spec.features.encoder, hidden=16, embedding_rms=1.0, seed=0)
    samples = mixed_samples(10) if text_only else fake_samples(6)
    images = [sample.image_sha256 for sample in samples if not sample.text_only]
    luck = random.Random(seed)
    whole = luck.choice(images)
    damaged = {
        (branch, image)
        for branch, share in zip(("global", "local"), damage, strict=True)
        for image in images
        if image != whole and luck.random() < share
    }

    def process(number):
        """What a process knows: nothing at its start."""
        source = DamagedFeatures(spec, damaged, number)
        fields = {"features": spec.features, "connector": connector, "schedule": schedule, "tokenizer": tiny_tokenizer, "max_tokens": 2048}
        return BatchBuilder(samples=samples, source=source, substitutes=True, **fields)

    def seen(builders, step):
        """What all ranks together are given at a step, their shares one behind the other."""
        phase, step = divmod(step, STEPS)
        ranks = [builder.build(phase, step, rank=rank, world=len(builders)) for rank, builder in enumerate(builders)]
        given_now = [builder.source.given[-1] for builder in builders]
        return (
            {branch: [image for given_one in given_now for image in given_one[branch]] for branch in ("global", "local")},
            torch.cat([rank.micro_batches[0].text_ids for rank in ranks]).tolist(),
            sum(rank.num_missing for rank in ranks),
        )

    begun, resumed = ([process(10 * place + rank) for rank in range(world)] for place, world in enumerate(worlds))
    for builder in begun:
        builder.measuring_maps(len(images))
        left = [image for image in images if not {("global", image), ("local", image)} & damaged]
        assert builder.source.given == [{"global": left, "local": left}]
    reference = process(99)
    for step in range(2 * STEPS):
        phase, within = divmod(step, STEPS)
        planned = reference._indices(phase, within)
        stand_ins = [expected_index(reference, phase, step * BATCH + k, index, damaged) for k, index in enumerate(planned)]
        template = schedule.phases[phase].template
        texts = [reference.conversation(index, template) for index, _ in stand_ins]
        expected = (
            {b: [samples[index].image_sha256 for index, shown in stand_ins if b in shown] for b in ("global", "local")},
            [token for text in texts for token in (*text.before, *text.after)],
            sum(index != other for index, (other, _) in zip(planned, stand_ins, strict=True)),
        )
        assert seen(begun if step < resume else resumed, step) == expected
