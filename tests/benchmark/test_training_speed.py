"""Claims guarded: a demo-sized training step (32 conversations of about 230 tokens, DCI connector, Llama of 4 layers x 256) runs at 40 conversations
a second on two cores with products of bf16, at 10 on two without (AVX2 alone). There, holding the frozen language model in fp32 is 14 times faster
than in bf16 (`bf16 in software`: 0.7). `make bench` prints the figures; set THREADS to compare numbers of threads."""

import os
import time
from dataclasses import replace

import pytest
import torch

from model.connector import Connector
from model.language_model import LanguageModel, embedding_rms, hold_in, hold_rounded, multiplies_bf16
from model.specs import CompressionSpec, ConnectorSpec, DCISpec, GatedMixtureSpec, GlobalBranchSpec, LocalBranchSpec
from model.vision_language import VisionLanguageModel
from tests.tiny import tiny_tokenizer
from tests.tiny_training import FakeFeatures, fake_samples, tiny_encoder_spec, tiny_training_spec
from workers.training.batches import BatchBuilder
from workers.training.engine import DeepSpeedEngine, solo_process_group

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]


def demo_model(precision, frozen):
    from transformers import LlamaConfig, LlamaForCausalLM

    fusion = DCISpec(base=7, groups=((0, 3), (4, 7)))
    spec = ConnectorSpec(
        global_branch=GlobalBranchSpec(fusion=fusion, adapters=GatedMixtureSpec()),
        local_branch=LocalBranchSpec(fusion=fusion, compression=CompressionSpec(queries=16)),
    )
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(vocab_size=2048, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4)
    network = LlamaForCausalLM(config)
    if frozen:
        network.requires_grad_(requires_grad=False)
        if precision == "bf16":
            hold_rounded(network, native=multiplies_bf16("cpu"))
        elif precision == "bf16 in software":
            hold_in(network, torch.bfloat16)
    connector = Connector(
        spec,
        encoder_width=192,
        num_patches=64,
        hidden=256,
        embedding_rms=embedding_rms(network),
        generator=torch.Generator().manual_seed(0),
    )
    return VisionLanguageModel(connector, LanguageModel(network=network, tokenizer=tokenizer, max_tokens=2048), precision=precision[:4])


@pytest.mark.parametrize(("precision", "frozen"), [("bf16", True), ("bf16", False), ("fp32", True), ("fp32", False), ("bf16 in software", True)])
def test_conversations_per_second(precision, frozen, tiny_language_model_folder):
    if "software" in precision and multiplies_bf16("cpu"):
        pytest.skip("this CPU multiplies bf16 in hardware")
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    solo_process_group()
    model = demo_model(precision, frozen)
    base = tiny_training_spec(tiny_language_model_folder)
    encoder = tiny_encoder_spec(view_px=112, width=192, num_blocks=8)
    maps = model.connector.spec.global_branch.fusion.maps
    features = replace(base.features, encoder=encoder, views=replace(base.features.views, max_slices=6), global_maps=maps, local_maps=maps)
    phase = replace(base.schedule.sft, batch_size=32, branch=replace(base.schedule.sft.branch, both=1.0, global_only=0, local_only=0, blind=0))
    spec = replace(base, features=features, connector=model.connector.spec, schedule=replace(base.schedule, align=(), sft=phase))
    samples = [replace(sample, image=replace(sample.image, width_px=672, height_px=448)) for sample in fake_samples(96)]
    builder = BatchBuilder(
        samples=samples,
        source=FakeFeatures(spec),
        features=features,
        connector=model.connector,
        schedule=spec.schedule,
        tokenizer=model.tokenizer,
        max_tokens=2048,
    )
    started = time.monotonic()
    steps = [builder.build(0, step) for step in range(3)]
    building = (time.monotonic() - started) / 3
    length = steps[0].micro_batches[0].gather.shape[1]
    active = model.connector.spec.blocks if frozen else (*model.connector.spec.blocks, "language_model")
    engine = DeepSpeedEngine(model, active)
    engine.set_active(active)
    times = []
    for number in range(3 if "software" in precision else 6):
        started = time.monotonic()
        step = steps[number % 3]
        engine.step(step.micro_batches, supervised=step.supervised, rates=dict.fromkeys(active, 1e-3), max_grad_norm=1.0)
        times.append(time.monotonic() - started)
    engine.close()
    best = min(times[1:])
    print(
        f"\n{precision}, language model {'frozen' if frozen else 'trained'}, {torch.get_num_threads()} threads, length {length}: "
        f"{32 / best:.1f} conversations/s (best of {len(times) - 1}: {best * 1000:.0f} ms, worst {max(times[1:]) * 1000:.0f} ms; building a batch "
        f"{building * 1000:.0f} ms)"
    )
