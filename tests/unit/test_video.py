"""Frames of real videos, written by the test: which are taken, how they stand, and what becomes of their tokens."""

import io
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model.errors import ImageError, SpecError
from model.images import ImageLimits
from model.video import frame_places, grid_plan, pool_frames, read_frames


def shade(place):
    """A grey that tells the place, also behind a lossy codec."""
    return 8 * place


def animation(count, kind="GIF"):
    frames = [Image.new("RGB", (32, 24), (shade(place),) * 3) for place in range(count)]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], lossless=True)
    return out.getvalue()


def video(count, *, container="mp4", codec="mpeg4", size=(32, 24), rotation=0):
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for place in range(count):
            pixels = np.full((size[1], size[0], 3), shade(place), dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return out.getvalue()


def places_of(frames):
    return [round(np.asarray(frame).mean() / 8) for frame in frames]


@pytest.mark.parametrize(("num_frames", "wanted", "places"), [(9, 2, (2, 6)), (100, 4, (12, 37, 62, 86)), (1, 3, (0, 0, 0)), (8, 8, None)])
def test_middles_of_equal_parts(num_frames, wanted, places):
    found = frame_places(num_frames, wanted)
    assert len(found) == wanted
    if places is not None:
        assert found == places


@given(num_frames=st.integers(1, 5000), wanted=st.integers(1, 64))
def test_places_are_there_and_in_order(num_frames, wanted):
    found = frame_places(num_frames, wanted)
    assert len(found) == wanted
    assert list(found) == sorted(found)
    assert 0 <= found[0] <= found[-1] < num_frames
    width = (num_frames - 1) / wanted
    for part, place in enumerate(found):
        assert abs(place - (part + 0.5) * width) <= 1.5


def test_no_frames_are_an_error():
    for numbers in ((0, 1), (1, 0)):
        with pytest.raises(SpecError, match="at least one frame"):
            frame_places(*numbers)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_frames_of_animations(kind):
    frames = read_frames(animation(10, kind), 4)
    assert places_of(frames) == list(frame_places(10, 4))
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (32, 24))}


@pytest.mark.parametrize(("container", "codec"), [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("mpegts", "mpeg2video")])
def test_frames_of_videos(container, codec):
    data = video(20, container=container, codec=codec)
    frames = read_frames(data, 5)
    assert np.abs(np.array(places_of(frames)) - np.array(frame_places(20, 5))).max() <= 1
    assert {frame.mode for frame in frames} == {"RGB"}
    assert places_of(read_frames(data, 5)) == places_of(frames)


def test_a_still_picture_is_a_video_of_one_frame():
    assert places_of(read_frames(animation(1, "PNG"), 3)) == [0, 0, 0]


def test_a_cut_off_video_gives_what_it_has_or_an_error():
    data = video(20, container="mpegts", codec="mpeg2video")
    assert len(read_frames(data[: len(data) // 2], 4)) == 4
    for broken in (b"no video at all", data[:100]):
        with pytest.raises(ImageError):
            read_frames(broken, 4)


def test_what_is_too_large_is_refused_before_it_is_decoded():
    data = video(3)
    with pytest.raises(ImageError, match="at most 100 are allowed"):
        read_frames(data, 2, ImageLimits(max_pixels=100))
    with pytest.raises(ImageError, match="bytes; at most 10 are allowed for a video"):
        read_frames(data, 2, ImageLimits(max_bytes=1))
    with pytest.raises(ImageError, match="no bytes"):
        read_frames(b"", 2)


def test_a_picture_that_promises_too_much_is_refused_as_an_image_is():
    """A header of 900 megapixels, a smear, and a format that would start a program."""
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    smear = io.BytesIO()
    Image.new("L", (1, 3000)).save(smear, "GIF")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n"
    for data, reason in ((bomb.getvalue(), "too_many_pixels"), (smear.getvalue(), "extreme_aspect"), (script, None)):
        with pytest.raises(ImageError) as caught:
            read_frames(data, 2)
        assert reason in (None, caught.value.reason)


def test_sound_alone_is_no_video():
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format="wav") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            file.mux(packet)
    with pytest.raises(ImageError, match="no video"):
        read_frames(out.getvalue(), 2)


def test_without_pyav_it_says_what_to_install(monkeypatch):
    data = video(3)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImageError, match=r"pip install -e '\.\[video\]'"):
        read_frames(data, 2)


@pytest.mark.parametrize("pool", [1, 2, 3])
def test_pooling_takes_the_largest_of_neighbours(pool):
    tokens = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    found = pool_frames(tokens, pool)
    expected = [tokens[t, k * pool : (k + 1) * pool].max(dim=0).values for t in range(3) for k in range(8 // pool)]
    assert torch.equal(found, torch.stack(expected)[None])
    with pytest.raises(SpecError, match="use 1 to 8"):
        pool_frames(tokens, 9)


@pytest.mark.parametrize(("count", "grid"), [(8, (4, 2)), (1, (1, 1)), (4, (2, 2)), (7, (7, 1)), (12, (4, 3))])
def test_frames_tile_a_canvas(count, grid):
    plan = grid_plan(count, 28)
    assert (plan.columns, plan.rows) == grid
    assert len(plan.local_views) == count
    assert [(view.source.width_px, view.source.height_px) for view in plan.local_views] == [(28, 28)] * count


def exported_model(encoder_folder, language_model_folder, *, local):
    from model.connector import build_connector
    from model.encoder import describe_encoder, load_encoder
    from model.export import ExportConfig, ExportedModel
    from model.language_model import embedding_rms, load_language_model
    from model.specs import CompressionSpec, ConnectorSpec, GlobalBranchSpec, LocalBranchSpec, MLPSpec, SingleSpec, TextGuidedSelectorSpec
    from model.views import ViewSpec
    from model.vision_language import VisionLanguageModel

    fusion = SingleSpec(layer=5)
    branch = LocalBranchSpec(
        fusion=fusion, compression=CompressionSpec(queries=4), merge="spatial", selector=TextGuidedSelectorSpec(top_p=0.6, temperature=0.2)
    )
    spec = ConnectorSpec(global_branch=GlobalBranchSpec(fusion=fusion, adapters=MLPSpec()), local_branch=branch if local else None)
    language_model, encoder = load_language_model(language_model_folder), describe_encoder(str(encoder_folder))
    rms = embedding_rms(language_model.network)
    connector = build_connector(spec, encoder, hidden=language_model.hidden, embedding_rms=rms, seed=0)
    config = ExportConfig(
        connector=spec,
        encoder=encoder,
        views=ViewSpec.slime(),
        feature_precision="fp16",
        precision="fp32",
        language_model_precision="fp32",
        selects=local,
    )
    model = VisionLanguageModel(connector, language_model)
    return ExportedModel(config=config, model=model, encoder=load_encoder(encoder, 5))


def noise_frames(count):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 40, 60, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]


def greedy(model, sequence, count):
    table, found = model.language_model.get_input_embeddings(), []
    for _ in range(count):
        token = int(model.language_model(inputs_embeds=sequence[None]).logits[0, -1].argmax())
        if token == model.tokenizer.eos_token_id:
            break
        found.append(token)
        sequence = torch.cat([sequence, table(torch.tensor([token]))])
    return model.tokenizer.decode(found, skip_special_tokens=True).strip()


@torch.no_grad()
def test_frames_stand_in_one_place_behind_each_other(tiny_encoder_folder, tiny_language_model_folder):
    """Every frame encoded and projected alone, its tokens pooled by hand, in the one place of an image."""
    from model.chat import tokenise_question
    from model.images import cut_views
    from model.video import ask_video
    from model.views import plan_views

    exported = exported_model(tiny_encoder_folder, tiny_language_model_folder, local=False)
    frames, model = noise_frames(5), exported.model
    answer = ask_video(exported, frames, "What is it?", max_new_tokens=6)
    asked = tokenise_question(model.tokenizer, "What is it?", 1000)
    table = model.language_model.get_input_embeddings()
    parts = [table(torch.tensor(asked.before))]
    for frame in frames:
        plan = plan_views(60, 40, 56, exported.config.views)
        tokens = model.connector.global_tokens(
            exported.maps_of(cut_views(frame, plan, "global"), exported.config.connector.global_branch.fusion.maps)
        )[0]
        parts += [tokens[2 * k : 2 * k + 2].max(dim=0).values[None] for k in range(len(tokens) // 2)]
    parts.append(table(torch.tensor(asked.after)))
    assert (answer.text, answer.mode, answer.num_visual_tokens) == (greedy(model, torch.cat(parts), 6), "global", 5 * 8)
    reversed_ = ask_video(exported, frames[::-1], "What is it?", max_new_tokens=6)
    assert reversed_.num_visual_tokens == 40


@torch.no_grad()
def test_frames_tile_the_local_views_and_their_mean_is_the_global_one(tiny_encoder_folder, tiny_language_model_folder):
    from model.images import cut_views
    from model.video import ask_video
    from model.views import plan_views
    from model.vision_language import lay_out_images, plan_sequences

    exported = exported_model(tiny_encoder_folder, tiny_language_model_folder, local=True)
    frames, model = noise_frames(4), exported.model
    maps = exported.config.connector.global_branch.fusion.maps
    plan = plan_views(60, 40, 56, exported.config.views)
    each = [exported.maps_of(cut_views(frame, plan, "global"), maps)["layer_5"] for frame in frames]
    from model.chat import tokenise_question

    asked = tokenise_question(model.tokenizer, "What is it?", 1000)
    batch = plan_sequences(
        [asked],
        ["both"],
        [0],
        lay_out_images(model.connector, [True], [grid_plan(4, 56)]),
        pad_left=True,
        global_maps={"layer_5": sum(each) / 4},
        local_maps={"layer_5": torch.cat(each)},
        selects=True,
    )
    expected = model.tokenizer.decode(model.generate(batch, 6)[0], skip_special_tokens=True).strip()
    answer = ask_video(exported, frames, "What is it?", max_new_tokens=6)
    assert (answer.text, answer.mode, answer.num_visual_tokens) == (expected, "both", 16 + 1 + 4 * 4)
    assert ask_video(exported, frames, "What is it?", "frames", max_new_tokens=6).mode == "global"


def test_videos_that_cannot_be_asked(tiny_encoder_folder, tiny_language_model_folder):
    from model.errors import ExportError
    from model.video import ask_video

    exported = exported_model(tiny_encoder_folder, tiny_language_model_folder, local=False)
    with pytest.raises(ExportError, match="no local branch"):
        ask_video(exported, noise_frames(2), "What?", "grid")
    with pytest.raises(SpecError, match="at least one frame"):
        ask_video(exported, [], "What?")
    with pytest.raises(SpecError, match="300 frames make 2400 visual tokens, but a sequence holds 2048; show fewer frames"):
        ask_video(exported, noise_frames(300), "What?")
