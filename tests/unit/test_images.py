import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from model.errors import ImageError, SpecError
from model.images import REASONS, ImageLimits, cut_views, decode_image, detail_score
from model.views import ViewSpec, plan_views


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width, height, mode="RGB", seed=0):
    channels = len(mode) if mode in ("RGB", "RGBA", "CMYK") else 1
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode)


def png_header(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 9) + b"IDAT" + bytes(13)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404 not found</html>", "not_an_image"),
        (png_header(30_000, 30_000), "too_many_pixels"),
        (png_header(9_000, 8_000), "too_many_pixels"),
        (png_header(5_000, 10), "extreme_aspect"),
        (encoded(noise(64, 64), "JPEG")[:700], "truncated"),
        (encoded(noise(64, 64))[:2000], "truncated"),
        (encoded(Image.new("F", (8, 8)), "TIFF"), "undecodable"),
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * 40, "not_an_image"),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(data, reason):
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.reason == reason
    assert reason in REASONS


@pytest.mark.parametrize(("width", "height"), [(9_000, 8_000), (20_000, 10_000)])
def test_the_limit_of_pixels_that_is_named_is_ours(width, height):
    """Pillow refuses the second by itself, and has another limit."""
    with pytest.raises(ImageError, match=rf"has ({width}x{height}|{width * height}) pixels; at most {ImageLimits().max_pixels} are allowed"):
        decode_image(png_header(width, height))


def test_a_frame_that_is_larger_than_its_file_says_is_refused_by_our_limit(monkeypatch):
    def load(image):
        raise Image.DecompressionBombError("Image size (200000000 pixels) exceeds limit of 178956970 pixels, could be decompression bomb DOS attack.")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(ImageError, match="has 200000000 pixels; at most 64000000") as caught:
        decode_image(encoded(noise(8, 8)))
    assert caught.value.reason == "too_many_pixels"


def test_too_many_bytes_are_refused_before_anything_is_read():
    with pytest.raises(ImageError) as caught:
        decode_image(encoded(noise(8, 8)), ImageLimits(max_bytes=100))
    assert caught.value.reason == "too_many_bytes"


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "PNG"), ("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("RGBA", "WEBP"), ("LA", "PNG")]
)
def test_every_mode_comes_out_as_rgb(mode, kind):
    image = decode_image(encoded(noise(20, 10).convert(mode), kind))
    assert (image.mode, image.size) == ("RGB", (20, 10))


def test_transparency_is_laid_on_black():
    image = decode_image(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0))))
    assert np.asarray(image).max() == 0


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    image = decode_image(encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]))
    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(noise(20, 10), "JPEG", exif=exif)).size == (10, 20)


def test_sixteen_bits_are_scaled_by_their_range():
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    image = decode_image(encoded(Image.fromarray(values)))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 100, 255]


def test_a_colour_profile_is_converted_and_a_broken_one_ignored():
    source = noise(8, 8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = np.asarray(decode_image(encoded(source, icc_profile=srgb)), dtype=int)
    assert np.abs(same - np.asarray(source, dtype=int)).max() <= 1
    assert np.array_equal(np.asarray(decode_image(encoded(source, icc_profile=b"no profile"))), np.asarray(source))


def test_a_picture_in_other_primaries_is_converted_and_not_just_relabelled():
    """A profile whose red and blue primaries have changed places: red in the file is blue to the eye."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")  # names in the tag table
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    red_square = Image.new("RGB", (8, 8), (250, 20, 20))
    for mode in ("RGB", "RGBA", "P"):
        taken = np.asarray(decode_image(encoded(red_square.convert(mode), icc_profile=bytes(profile))), dtype=int)
        as_stored = np.asarray(red_square.convert(mode).convert("RGB"), dtype=int)
        assert np.abs(taken - as_stored[..., ::-1]).max() <= 2, mode


def test_views_are_the_squash_and_the_tiles_of_the_padded_canvas():
    image = noise(300, 200)
    plan = plan_views(300, 200, 56, ViewSpec())
    views = cut_views(image, plan)
    assert views.shape == (1 + plan.rows * plan.columns, 3, 56, 56)
    squash = np.asarray(image.resize((56, 56), Image.Resampling.BICUBIC))
    assert np.array_equal(views[0].transpose(1, 2, 0), squash)
    canvas = Image.new("RGB", (plan.canvas_width_px, plan.canvas_height_px))
    canvas.paste(image.resize((plan.scaled_width_px, plan.scaled_height_px), Image.Resampling.BICUBIC), (plan.offset_x_px, plan.offset_y_px))
    for view in plan.local_views:
        tile = canvas.crop((view.column * 56, view.row * 56, view.column * 56 + 56, view.row * 56 + 56))
        assert np.array_equal(views[view.index].transpose(1, 2, 0), np.asarray(tile))
    assert np.array_equal(cut_views(image, plan, "global"), views[:1])
    assert np.array_equal(cut_views(image, plan, "local"), views[1:])


def test_a_plan_for_another_size_is_refused():
    with pytest.raises(SpecError, match="300x200 px, found 200x300"):
        cut_views(noise(200, 300), plan_views(300, 200, 56, ViewSpec()))


def test_a_square_image_is_bit_equal_to_the_clip_processor():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = noise(160, 160)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_normalize=False, do_rescale=False)
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    ours = cut_views(image, plan_views(160, 160, 56, ViewSpec()), "global")[0]
    assert np.array_equal(ours, theirs)


def test_detail_score_grows_with_detail():
    smooth = Image.linear_gradient("L").convert("RGB")
    assert detail_score(Image.new("RGB", (64, 64), "grey"), 16) == 0
    assert detail_score(smooth, 64) < 0.05
    assert 0.5 < detail_score(noise(256, 256), 64) <= 1
