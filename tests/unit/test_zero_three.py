"""ZeRO-3 in processes of its own, on one and two ranks: the losses of plain torch, exact resume, whole tensors in what is saved."""

import json
import subprocess
import sys
import time

import pytest
import safetensors.torch

from tests.commands import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny_language_model_folder):
    """Runs a job on some ranks; finished jobs are kept. Gives what the ranks wrote, and the store."""
    done = {}

    def run(*, world=1, name=None, expect=0, **changes):
        usual = {"zero_stage": 3, "lora": False, "precision": "fp32", "micro_batch_size": 1, "gradient_checkpointing": False, "die_after": None}
        job = usual | changes
        key = json.dumps([world, name, job], sort_keys=True)
        if key not in done:
            store = tmp_path_factory.mktemp("ranks") if name is None else tmp_path_factory.getbasetemp() / name
            meeting = store / f"meeting-{time.time_ns()}"
            store.mkdir(exist_ok=True)
            told = job | {"world": world, "meeting": str(meeting), "store": str(store), "language_model": str(tiny_language_model_folder)}
            processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "tests.rank_driver", json.dumps(told | {"rank": rank})],
                    cwd=REPOSITORY,
                    stderr=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    text=True,
                )
                for rank in range(world)
            ]
            ended = [(process.communicate(timeout=250)[1], process.returncode) for process in processes]
            assert [code for _, code in ended] == [expect] * world, ended[0][0][-3000:]
            written = [] if expect else [json.loads((store / "out" / f"rank-{rank}.json").read_text()) for rank in range(world)]
            done[key] = (written, store)
        return done[key]

    return run


def test_two_ranks_hold_half_of_the_language_model_each(ranks):
    (one,), _ = ranks(zero_stage=0)
    two, _ = ranks(world=2)
    assert [rank["held"] for rank in two] == [pytest.approx(one["held"] / 2, rel=0.01)] * 2
    assert [rank["left"] for rank in two] == [0, 0]  # no matrix is whole outside of its use


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_losses_are_those_of_zero_0_and_of_plain_torch(ranks, world, lora):
    (twin,), _ = ranks(zero_stage=None, lora=lora)
    found, _ = ranks(world=world, lora=lora)
    plain, _ = ranks(world=world, zero_stage=0, lora=lora)
    # The most seen was 2e-6 relative on one rank and on two, sums in another order and a norm of slices.
    assert found[0]["losses"] == pytest.approx(twin["losses"], rel=1e-5)
    assert found[0]["losses"] == pytest.approx(plain[0]["losses"], rel=1e-5)
    assert found[0]["losses"] == found[-1]["losses"]
    assert found[0]["before"] == twin["before"]
    assert found[0]["after"] == found[-1]["after"]
    unchanged = {block for block in twin["before"] if found[0]["before"][block] == found[0]["after"][block]}
    assert unchanged == ({"language_model_base"} if lora else set())


@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_whose_samples_show_different_views_meet_on_every_stage(ranks, stage):
    (twin,), _ = ranks(zero_stage=None)
    found, _ = ranks(world=2, zero_stage=stage)
    assert found[0]["losses"] == pytest.approx(twin["losses"], rel=1e-5)


@pytest.mark.parametrize(("world", "lora"), [(1, True), (2, False)])
def test_a_killed_run_resumes_in_the_same_bytes(ranks, world, lora):
    straight, whole = ranks(world=world, lora=lora)
    name = f"killed-{world}"
    ranks(world=world, lora=lora, name=name, die_after=3, expect=9)
    resumed, store = ranks(world=world, lora=lora, name=name)
    assert resumed[0]["losses"] == straight[0]["losses"][4 - len(resumed[0]["losses"]) :]
    assert 0 < len(resumed[0]["losses"]) < 4
    assert resumed[0]["after"] == straight[0]["after"]
    last = "checkpoints/k/sft/step-00000016"
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (store / last / file).read_bytes() == (whole / last / file).read_bytes()


def test_what_is_saved_is_whole(ranks):
    (plain,), _ = ranks(zero_stage=0)
    found, store = ranks(world=2)
    assert found[0]["shapes"] == found[1]["shapes"] == plain["shapes"]
    last = store / "checkpoints/k/sft/step-00000016"
    saved = safetensors.torch.load_file(last / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == plain["shapes"]
    state = safetensors.torch.load_file(last / "optimizer.safetensors")
    trained = [name for name in saved if not name.endswith((".mean", ".scale", "token_scale"))]
    assert state.keys() == {f"{name}:{kind}" for name in trained for kind in ("exp_avg", "exp_avg_sq", "step")}
    assert all(state[f"{name}:exp_avg"].shape == saved[name].shape for name in trained)
    assert {float(state[f"{name}:step"]) for name in trained} == {4.0}


def test_layers_that_are_computed_again_change_no_number(ranks):
    kept, _ = ranks(world=2, lora=True)
    again, _ = ranks(world=2, lora=True, gradient_checkpointing=True)
    assert again[0]["losses"] == kept[0]["losses"]
    assert again[0]["after"] == kept[0]["after"]


def test_a_bf16_base_below_adapters_is_shared_out_too(ranks):
    (plain,), _ = ranks(zero_stage=0, lora=True, precision="bf16")
    found, _ = ranks(world=2, lora=True, precision="bf16")
    # bf16 products; 3e-4 relative was the most seen.
    assert found[0]["losses"] == pytest.approx(plain["losses"], rel=2e-3)
    assert found[0]["before"]["language_model_base"] == plain["after"]["language_model_base"] == found[0]["after"]["language_model_base"]
