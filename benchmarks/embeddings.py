"""Whether vectors of titles, pictures and purchases mean something: do neighbours share the category, does a new item find its own, and what does it cost?

    python benchmarks/embeddings.py
    python benchmarks/embeddings.py --items 200 --customers 500 --days 60 --splits 1     # a quick look

Three sets of items: a simulated shop (drawn pictures, titles and purchases), 600 fashion photographs of 60 × 80 pixels in 25 article types, and the
groceries whose coarse class has at least three pictures (SHOPAI_DATA_DIR, product_images). In each split, a fifth of the items is new: encoders are fitted
on the others, and a new item's category is what its 10 nearest among the others vote for. Vectors from purchases need purchases, so with them only the
category is new, not the item. `share` is how many of the 10 nearest of all items are of the same category, `chance` the same for random neighbours, and
`possible` what perfect vectors would reach, since a small category doesn't have ten. Many titles name their category; a picture never does.
Seconds are those of encoding 1,000 titles, of reading and encoding 1,000 pictures on one thread (the axes included), and of fitting 1,000 items' purchases.

A second table says what each choice in the pictures' encoder is worth, on the half of the fashion photographs on which it was made and on the other half.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from threadpoolctl import threadpool_limits

from shopai.core.config import get_settings
from shopai.core.files import write_json
from shopai.core.manifest import code_version
from shopai.data.interactions import purchases
from shopai.data.pictures import write_pictures
from shopai.data.simulator import simulate
from shopai.data.world import make_world
from shopai.features.image import SIZE, ImageVectors, decode, learn_axes, load_network, look, square
from shopai.features.interactions import ALSVectors
from shopai.features.text import title_encoder
from shopai.features.vectors import agreement, unit, vote

RESULT = Path(__file__).resolve().parent / "results" / "embeddings.json"
K = 10
TITLES = ("word2vec", "fasttext", "tfidf", "sentence")
PICTURES = {"efficientnet-lite0, all features": None, "efficientnet-lite0, 128 axes": 128}


@dataclass(frozen=True)
class Goods:
    "Items with what is known of them."
    name: str
    folder: Path            # of the pictures
    table: pd.DataFrame     # title, image_path, category
    bought: object = None   # interactions, where there are any

    @property
    def categories(self) -> np.ndarray: return self.table["category"].to_numpy(str)


def simulated(folder: Path, customers: int, items: int, days: int) -> Goods:
    world = make_world(customers, items, days, seed=0)
    catalogue = world.catalogue
    write_pictures(catalogue, folder)
    events = simulate(world).tables["events"].to_pandas()
    table = pd.DataFrame({"item_id": catalogue.item_ids, "title": catalogue.titles, "image_path": [f"{name}.png" for name in catalogue.item_ids],
                          "category": np.array(catalogue.leaf_names)[catalogue.leaf]})
    return Goods("simulated shop", folder, table, purchases(events))


def photographed(data: Path) -> list[Goods]:
    "The two public sets, where they are."
    folder, found = data / "product_images", []
    if (folder / "fashion.csv").is_file():
        table = pd.read_csv(folder / "fashion.csv").rename(columns={"productDisplayName": "title", "file": "image_path", "articleType": "category"})
        found.append(Goods("fashion", folder, table[["title", "image_path", "category"]]))
    if (folder / "grocery.csv").is_file():
        table = pd.read_csv(folder / "grocery.csv").rename(columns={"description": "title", "file": "image_path", "coarse_class": "category"})
        table = table[table.groupby("category")["category"].transform("size") >= 3].reset_index(drop=True)
        found.append(Goods("grocery", folder, table[["title", "image_path", "category"]]))
    return found


def split(categories: np.ndarray, number: int) -> np.ndarray:
    "(n,) a fifth is new, but one of each category is not."
    order = np.random.default_rng(number).permutation(len(categories))
    new = np.zeros(len(categories), bool)
    new[order[:len(order) // 5]] = True
    first = pd.Series(categories[order]).drop_duplicates().index.to_numpy()
    new[order[first]] = False
    return new


def judge(goods: Goods, kind: str, encode: Callable[[np.ndarray], tuple[np.ndarray, float]], splits: int) -> dict:
    "`encode(new)` gives vectors of all items, from an encoder that didn't see the new ones, and the seconds to encode 1,000."
    labels, shares, right, times = goods.categories, [], [], []
    for number in range(splits):
        new = split(labels, number)
        vectors, seconds = encode(new)
        shares.append(agreement(vectors, labels, K))
        right.append((vote(vectors[~new], labels[~new], vectors[new], K) == labels[new]).mean())
        times.append(seconds)
    sizes = pd.Series(labels).map(pd.Series(labels).value_counts()).to_numpy()
    share, chance, possible = np.mean([each.share for each in shares]), shares[0].chance, np.minimum(sizes - 1, K).mean() / K
    row = {"items": goods.name, "model": kind, "n": len(labels), "categories": len(set(labels)), "chance": round(chance, 4), "share": round(float(share), 4),
           "possible": round(float(possible), 4), "lift": round(float(share / chance), 1), "new_right": round(float(np.mean(right)), 4),
           "seconds_per_1000": round(float(max(times)), 3)}
    print(json.dumps(row), flush=True)
    return row


def by_title(goods: Goods, kind: str) -> Callable:
    titles = goods.table["title"].to_numpy()

    def encode(new: np.ndarray) -> tuple[np.ndarray, float]:
        encoder = title_encoder(kind).fit(titles[~new].tolist())
        began = time.perf_counter()
        return encoder.transform(titles.tolist()), (time.perf_counter() - began) / len(titles) * 1000

    return encode


def by_picture(goods: Goods, dim: int | None, cache: Path) -> Callable:
    def encode(new: np.ndarray) -> tuple[np.ndarray, float]:
        encoder, paths, began = ImageVectors(dim=dim, cache=cache), goods.table["image_path"], time.perf_counter()
        encoder.fit(goods.folder, paths[~new], progress=False)  # looks at four fifths, unless they are in the cache,
        encoded = encoder.transform(goods.folder, paths, progress=False)  # and this at the rest
        assert encoded.rejected.empty, encoded.rejected
        return encoded.vectors, (time.perf_counter() - began) / len(paths) * 1000

    return encode


def by_purchase(goods: Goods) -> tuple[Goods, Callable]:
    "Of items that were bought; their own vectors don't depend on the split."
    began = time.perf_counter()
    als = ALSVectors().fit(goods.bought)
    seconds = (time.perf_counter() - began) / len(als.item_ids) * 1000
    table = goods.table.set_index("item_id").loc[als.item_ids].reset_index()
    return Goods(goods.name, goods.folder, table), lambda new: (unit(als.items), seconds)


def pace(goods: Goods, n: int = 100) -> dict:
    "What one picture costs, on one thread."
    files, squares = [(goods.folder / path).read_bytes() for path in goods.table["image_path"][:n]], []
    clocks = {}
    for name, work in {"decode": lambda: squares.extend(square(decode(data)) for data in files), "network": lambda: look(np.stack(squares))}.items():
        look(np.zeros((1, SIZE, SIZE, 3), np.uint8))  # the network is loaded
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        clocks |= {f"{name}_ms": round((time.perf_counter() - wall) / n * 1000, 2), f"{name}_cpu_ms": round((time.process_time() - cpu) / n * 1000, 2)}
    return {"pictures": n, "threads": 1, **clocks, "pictures_per_second": round(1000 / clocks["network_ms"], 1)}


def tried_half(labels: np.ndarray) -> np.ndarray:
    "(n,) the half of each category on which the choices were made; it stays what it was."
    rng, half = np.random.default_rng(0), np.zeros(len(labels), bool)
    order = rng.permutation(len(labels))
    for name in np.unique(labels):
        rows = order[labels[order] == name]
        half[rows[:(len(rows) + rng.integers(2)) // 2]] = True
    return half


def as_imagenet(squares: np.ndarray) -> np.ndarray:
    "Features with the means and deviations that most networks of ImageNet expect."
    import torch
    mean, deviation = torch.tensor([.485, .456, .406]) * 255, torch.tensor([.229, .224, .225]) * 255
    see = lambda part: load_network().extract_features(((part - mean) / deviation).permute(0, 3, 1, 2)).mean(dim=(2, 3))
    with torch.inference_mode(): return torch.cat([see(part) for part in torch.from_numpy(squares).split(1)]).numpy()


def choices(goods: Goods, splits: int) -> list[dict]:
    "Figures of the encoder as it is, and with one choice made otherwise, on either half."
    pictures = [decode((goods.folder / path).read_bytes()) for path in goods.table["image_path"]]
    cut = np.stack([square(picture) for picture in pictures])
    padded = np.stack([np.asarray(ImageOps.pad(picture, (SIZE, SIZE), Image.Resampling.BICUBIC, color="white")) for picture in pictures])
    stretched = np.stack([np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for picture in pictures])
    plain = look(cut)
    rooted = unit(np.sqrt(plain))
    lifted = lambda lift: lambda rows, old: unit(learn_axes(rows[old], 128, lift).project(rows))
    as_it_is, whole = lifted(5), lambda rows, old: unit(rows)
    root = lambda features: unit(np.sqrt(features))
    variants = {
        "as it is": (rooted, as_it_is), "filled up with white instead of cut": (root(look(padded)), as_it_is),
        "stretched instead of cut": (root(look(stretched)), as_it_is), "pixels scaled as for other networks": (root(as_imagenet(cut)), as_it_is),
        "mean with the mirrored picture": (root((plain + look(cut[:, :, ::-1])) / 2), as_it_is), "without the square root": (unit(plain), as_it_is),
        "axes not whitened": (rooted, lifted(1e6)), "axes wholly whitened": (rooted, lifted(0)),
        "all 1280 features, no axes": (rooted, whole), "all features, no square root": (plain, whole)}
    labels = goods.categories
    half = tried_half(labels)
    rows = []
    for name, (features, project) in variants.items():
        row = {"choice": name}
        for side, part in {"tried": half, "other": ~half}.items():
            known, here = labels[part], features[part]
            new = [split(known, number) for number in range(2 * splits)]
            vectors = [project(here, ~each) for each in new]
            row[f"{side}_share"] = round(float(np.mean([agreement(each, known, K).share for each in vectors])), 4)
            right = [(vote(each[~n], known[~n], each[n], K) == known[n]).mean() for each, n in zip(vectors, new, strict=True)]
            row[f"{side}_new_right"] = round(float(np.mean(right)), 4)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--customers", type=int, default=2_000)
    parser.add_argument("--items", type=int, default=600)
    parser.add_argument("--days", type=int, default=120)
    parser.add_argument("--splits", type=int, default=3, help="each with another fifth of new items")
    parser.add_argument("--out", type=Path, default=RESULT)
    a = parser.parse_args()
    load, began, rows, worth = round(os.getloadavg()[0], 2), time.perf_counter(), [], []
    with tempfile.TemporaryDirectory(prefix="embeddings-") as temporary, threadpool_limits(1):
        sets = [simulated(Path(temporary) / "images", a.customers, a.items, a.days), *photographed(get_settings().data_dir)]
        speed = pace(sets[0], min(100, a.items))
        for goods in sets:
            for kind in TITLES: rows.append(judge(goods, f"title: {kind}", by_title(goods, kind), a.splits))
            for kind, dim in PICTURES.items(): rows.append(judge(goods, f"picture: {kind}", by_picture(goods, dim, Path(temporary) / f"cache {dim}"), a.splits))
            if goods.bought is not None:
                known, encode = by_purchase(goods)
                rows.append(judge(known, "purchases: als", encode, a.splits))
            if goods.name == "fashion": worth = choices(goods, a.splits)
    write_json(a.out, {"rows": rows, "choices": worth, "pace": speed, "k": K, "splits": a.splits, "customers": a.customers, "days": a.days,
                       "code": code_version(), "command": "python benchmarks/embeddings.py", "measured": datetime.now(UTC).isoformat(timespec="seconds"),
                       "seconds": round(time.perf_counter() - began),
                       "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "load_before": load}})
    with pd.option_context("display.width", 250, "display.max_columns", 20):
        print(pd.DataFrame(rows).to_string(index=False))
        if worth: print(pd.DataFrame(worth).to_string(index=False))
    print(json.dumps(speed))


if __name__ == "__main__":
    main()
