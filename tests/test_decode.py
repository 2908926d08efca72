"""Protects what is made of a shard's bytes: every image and label as it was packed, whoever packed it, and of a damaged
byte an error that names shard and key, or a neighbour's image where that was asked for; never another image, a hang, or
a member that is run.
"""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import picture, png_of, shard_of, tar_of
from PIL import Image

from tdiff.data.decode import Images, shard_images
from tdiff.errors import DataError

WHERE = "s3://bucket/set: shard train/shard-000007.tar"
NOISE = np.random.default_rng(0).integers(0, 256, (6, 1, 5, 5), dtype=np.uint8)
LABELS = [2, 0, 1, 1, 0, 2]


def refused(content: bytes, *args: object) -> str:
    """The message about a shard, which must be a DataError of one line that names it."""
    with pytest.raises(DataError) as caught:
        shard_images(content, WHERE, *args)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(WHERE)
    return message


def tried(content: bytes, *args: object) -> Images | None:
    """The images, or None where they are refused with a message that names the shard."""
    try:
        return shard_images(content, WHERE, *args)  # type: ignore[arg-type]
    except DataError:
        refused(content, *args)
        return None


def equal(found: Images, images: np.ndarray, labels: list[int] | None) -> None:
    assert found.images.dtype == np.uint8
    np.testing.assert_array_equal(found.images, images)
    if labels is None:
        assert found.labels is None
    else:
        assert found.labels is not None
        assert found.labels.dtype == np.int64
        assert found.labels.tolist() == labels


# --- what is read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labelled", [True, False])
def test_images_and_labels_come_back_in_order(channels: int, labelled: bool):
    images = np.random.default_rng(1).integers(0, 256, (7, channels, 4, 6), dtype=np.uint8)
    labels = [5, 0, 3, 3, 2, 1, 4] if labelled else None
    content = shard_of(images, labels)
    for shape, classes in ((None, None), ((channels, 4, 6), 6)):
        found = shard_images(content, WHERE, shape, classes)
        equal(found, images, labels)
        assert len(found) == 7


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "jpeg"), ("jpeg", "jpeg"), ("JPG", "jpeg"), ("webp", "webp")])
def test_jpeg_and_webp_are_read(suffix: str, kind: str, mode: str):
    if (mode, kind) == ("L", "webp"):
        pytest.skip("WebP has no grey images")
    ramp = np.add.outer(np.arange(16), np.arange(24)).astype(np.uint8) * 6
    picture = Image.fromarray(ramp).convert(mode)
    out = io.BytesIO()
    picture.save(out, kind, quality=90)
    found = shard_images(tar_of([(f"a.{suffix}", out.getvalue()), ("a.cls", b"1")]), WHERE)
    want = np.asarray(Image.open(io.BytesIO(out.getvalue())))
    equal(found, (want[None] if mode == "L" else want.transpose(2, 0, 1))[None], [1])
    assert np.abs(found.images.astype(int) - ramp).mean() < 6


def test_names_may_be_nested_and_suffixes_in_capitals():
    members = [
        ("./a/b.d/1.cls", b"1"),
        ("./a/b.d/1.PNG", png_of(NOISE[0])),
        ("a/1.png", png_of(NOISE[1])),
        ("a/1.cls", b"2"),
    ]
    equal(shard_images(tar_of(members), WHERE), NOISE[:2], [1, 2])
    assert "key x/y/7" in refused(tar_of([("x/y/7.png", b"")]))


def test_other_members_and_folders_are_passed_over():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("a", "b.d"):  # the second could pass for a sample
            folder = tarfile.TarInfo(name)
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        for name, content in [
            ("README", b"hello"),
            ("a/1.txt", b"\x80"),
            ("a/1.json", b"{"),
            ("a/1.png", png_of(NOISE[0])),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    equal(shard_images(out.getvalue(), WHERE), NOISE[:1], None)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_is_read(format: int):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for k, image in enumerate(NOISE):
            content = png_of(image)
            info = tarfile.TarInfo(f"{'folder/' * (12 if format == tarfile.USTAR_FORMAT else 40)}{k}.png")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    equal(shard_images(out.getvalue(), WHERE), NOISE, None)


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


def test_nothing_is_unpickled(tmp_path: Path):
    mark = tmp_path / "executed"
    trap = pickle.dumps(Trap(mark))
    pickle.loads(trap)
    assert mark.exists()  # it does work
    mark.unlink()
    kinds = ("pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "ten", "mp", "json", "x")
    members = [("a.png", png_of(NOISE[0])), ("a.cls", b"1"), *((f"a.{kind}", trap) for kind in kinds)]
    equal(shard_images(tar_of(members), WHERE), NOISE[:1], [1])
    for name in ("a.png", "a.jpg", "a.webp"):
        assert "key a" in refused(tar_of([(name, trap)]))
    assert "key a" in refused(tar_of([("a.png", picture()), ("a.cls", trap)]))
    refused(trap)
    assert not mark.exists()


# --- a tar that is damaged ---------------------------------------------------------------------------


def test_a_tar_that_is_cut_gives_an_error_or_fewer_images_but_no_others():
    """Fewer is what a tar reader sees at a cut between samples: the manifest's numbers tell (test_stream.py)."""
    content = shard_of(NOISE, LABELS)
    end = len(content.rstrip(b"\0"))
    outcomes = set()
    for length in {*range(0, end, 512), *range(0, end, 101), *range(end - 20, end)}:
        found = tried(content[:length], (1, 5, 5), 3)
        if found is None:
            outcomes.add("refused")
        else:
            assert len(found) <= 6 - (length < end - 512)
            equal(found, NOISE[: len(found)], LABELS[: len(found)])
            outcomes.add("fewer")
    assert outcomes == {"refused", "fewer"}


def test_a_cut_in_an_image_is_named():
    content = shard_of(NOISE, None)
    start = content.index(png_of(NOISE[2]))
    for length in (start, start + 1, start + 40):
        assert "key-2.png" in refused(content[:length]) or length == start
    message = refused(tar_of([("key-1.png", png_of(NOISE[1])), ("key-2.png", png_of(NOISE[2])[:-30])]))
    assert "key key-2" in message


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 512, b"\0" * 10240, b"hello" * 300, bytes(range(256)) * 40, picture()]
)
def test_what_is_no_tar_of_images_is_refused(content: bytes):
    refused(content)
    refused(content, (1, 5, 5), 3, [])


def test_a_tar_without_an_image_is_refused():
    assert "holds no image" in refused(tar_of([]))
    assert "holds no image" in refused(tar_of([("README", b"hello")]))
    message = refused(tar_of([("good.png", picture()), ("bad.cls", b"1"), ("bad.json", b"{}")]))
    assert "key bad: no image" in message


def header(name: str, size: int) -> bytes:
    """A tar's header with any size, negative ones too, and the right checksum."""
    info = tarfile.TarInfo(name)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (256**12 + size).to_bytes(13, "big")[1:] if size < 0 else b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [-512, -1024, -100, -(2**40), 2**33 - 1, 1025])
def test_a_header_with_an_impossible_size_ends_in_an_error(size: int):
    """Of a negative size some tar readers make an endless loop (CVE-2025-8194)."""
    good = tar_of([("a.png", picture())]).rstrip(b"\0")
    good += b"\0" * (-len(good) % 512)
    for before in (b"", good):
        refused(before + header("b.png", size) + b"\0" * 1024)


@given(st.sampled_from(["png", "jpeg", "webp"]), st.data())
@settings(deadline=None, max_examples=150)
def test_damaged_bytes_end_in_images_or_a_data_error(kind: str, data: st.DataObject):
    """Without a manifest's checksum a wrong pixel cannot be noticed, but nothing else may come of it."""
    members = []
    for k in range(3):
        out = io.BytesIO()
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(out, kind)
        members += [(f"k{k}.cls", b"%d" % k), (f"k{k}.{kind}", out.getvalue())]
    content = bytearray(tar_of(members))
    end = len(content.rstrip(b"\0"))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 1))
        content[at : at + data.draw(st.integers(1, 40))] = data.draw(st.binary(min_size=0, max_size=40))
    shape = data.draw(st.sampled_from([None, (3, 9, 7)]))
    damaged: list[str] | None = [] if data.draw(st.booleans()) else None
    found = tried(bytes(content), shape, 3, damaged)
    if found is not None:
        assert found.images.shape[1:] == (3, 9, 7) or shape is None
        assert found.labels is None or (found.labels.min() >= 0 and found.labels.max() < 3)
    assert all(message.startswith(WHERE) for message in damaged or [])


# --- a sample that is damaged ------------------------------------------------------------------------


def png_header(width: int, height: int, depth: int = 8) -> bytes:
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data))


WRONG_IMAGES = {
    "wider": picture(size=(6, 5)),
    "lower": picture(size=(5, 4)),
    "turned": picture(size=(4, 6)),
    "colour": picture("RGB"),
    "transparent": picture("RGBA"),
    "grey and transparent": picture("LA"),
    "16 bits": picture("I;16"),
    "1 bit": picture("1"),
    "palette": picture("P"),
    "CMYK": picture("CMYK", kind="jpeg"),
    "GIF": picture(kind="gif"),
    "BMP": picture(kind="bmp"),
    "TIFF": picture(kind="tiff"),
    "cut in its header": picture()[:20],
    "cut in its pixels": picture()[:-26],
    "cut in its noise": png_of(NOISE[0])[:-30],
    "empty": b"",
    "a pickle": pickle.dumps([1]),
    "zeros": b"\0" * 100,
    "no pixels": png_header(5, 5) + picture()[-12:],
}


@pytest.mark.parametrize("image", WRONG_IMAGES.values(), ids=WRONG_IMAGES)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_wrong_image_is_named_with_its_key(image: bytes, suffix: str):
    content = tar_of([("good.png", png_of(NOISE[0])), (f"bad-7.{suffix}", image), ("last.png", png_of(NOISE[1]))])
    for shape in ((1, 5, 5), None):  # without one, the first image's counts
        assert f"{WHERE}, key bad-7: " in refused(content, shape)
    damaged: list[str] = []
    equal(shard_images(content, WHERE, (1, 5, 5), None, damaged), NOISE[[0, 0, 1]], None)
    assert [message.startswith(f"{WHERE}, key bad-7: ") for message in damaged] == [True]


def test_a_first_image_of_another_size_is_named_by_the_shape_it_should_have():
    assert "key key-0: image is L 5x5, but should be (1, 6, 6)" in refused(shard_of(NOISE), (1, 6, 6))


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (9_000, 9_000)])
@pytest.mark.parametrize("shape", [None, (1, 5, 5)])
def test_a_decompression_bomb_is_named_and_not_decoded(width: int, height: int, shape: tuple[int, int, int] | None):
    bomb = png_header(width, height) + picture()[33:]
    members = [("good.png", picture()), ("bomb.png", bomb)]
    message = refused(tar_of(members), shape)
    assert "key bomb" in message
    assert "truncated" not in message
    assert "exceeds limit" in message or f"{height}x{width}" in message


@pytest.mark.parametrize(
    "label",
    [b"3", b"-1", b"9223372036854775808", b"999999999999999999999999", b"9" * 5000, b"one", b"", b"1.0", b"\x80"],
)
def test_a_wrong_label_is_named_with_its_key(label: bytes):
    content = tar_of([("a.png", png_of(NOISE[0])), ("a.cls", b"2"), ("bad.png", png_of(NOISE[1])), ("bad.cls", label)])
    assert f"{WHERE}, key bad: " in refused(content, (1, 5, 5), 3)
    if label != b"3":
        assert f"{WHERE}, key bad: " in refused(content)
    damaged: list[str] = []
    equal(shard_images(content, WHERE, None, 3, damaged), NOISE[[0, 0]], [2, 2])
    assert len(damaged) == 1


@pytest.mark.parametrize("labels", [[1, None, 2], [None, 1, 2], [None, None, 0], [1, 2, None]])
def test_labels_for_some_are_refused(labels: list[int | None]):
    members = []
    for k, label in enumerate(labels):
        members.append((f"{k}.png", png_of(NOISE[k])))
        if label is not None:
            members.append((f"{k}.cls", str(label).encode()))
    assert "some samples have labels and some have none" in refused(tar_of(members))
    assert "some samples have labels" in refused(tar_of([*members, ("bad.png", b"")]), None, None, [])


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "a.png"],
        ["a.png", "a.PNG"],
        ["a.cls", "a.png", "a.cls"],
        ["a.png", "b.png", "a.png"],
        ["a.png", "b.png", "a.jpg"],
        ["a.png", "b.png", "b.cls", "a.cls"],
    ],
)
def test_a_key_that_two_samples_have_is_named(names: list[str]):
    content = tar_of([(name, b"1" if name.endswith("cls") else picture()) for name in names])
    message = refused(content)
    assert "key a: two samples have this key" in message or f"({names[-1]}: duplicate" in message
    refused(content, None, None, [])  # nor is one of them skipped


# --- neighbours --------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["good", "good", "image", "label"]), min_size=1, max_size=9), st.booleans())
@settings(deadline=None, max_examples=100)
def test_a_neighbour_takes_the_place_of_what_is_damaged(states: list[str], labelled: bool):
    rng = np.random.default_rng(len(states))
    images = rng.integers(0, 256, (len(states), 1, 3, 3), dtype=np.uint8)
    members, bad = [], []
    for k, state in enumerate(states):
        if state == "image" or (state == "label" and labelled):
            bad.append(k)
        members.append((f"{k}.png", b"damaged" if state == "image" else png_of(images[k])))
        if labelled:
            members.append((f"{k}.cls", b"none" if state == "label" else str(k).encode()))
    content = tar_of(members)
    good = [k for k in range(len(states)) if k not in bad]
    damaged: list[str] = []
    if not good:
        assert refused(content, None, None, damaged) == damaged[0]
    else:
        found = shard_images(content, WHERE, None, None, damaged)
        assert len(found) == len(states)
        for k in range(len(states)):
            takes = next(j for j in range(len(states)) if np.array_equal(images[j], found.images[k]))
            assert takes in good
            assert abs(takes - k) == min(abs(j - k) for j in good)
            assert found.labels is None or found.labels[k] == takes
        assert (found.labels is not None) == labelled
    assert [message.split(": ")[1].split("key ")[-1] for message in damaged] == [str(k) for k in bad]
    if bad:
        assert f"key {bad[0]}: " in refused(content)


def test_colour_of_16_bits_is_not_cut_to_8():
    """Pillow would read it as RGB, without a word."""
    rows = b"".join(b"\0" + bytes(6 * 5) for _ in range(5))
    header = struct.pack(">IIBBBBB", 5, 5, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    assert "16 bits a channel" in refused(tar_of([("deep.png", png)]), (3, 5, 5))
