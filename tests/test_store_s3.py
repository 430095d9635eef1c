"""The model store in a bucket, against a real S3 server over HTTP (moto's, on a port of its own)."""
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shopai.core.artifacts import BundleError, ModelStore, verify, write_manifest
from shopai.core.config import UsageError

fs = pytest.importorskip("pyarrow.fs")


@pytest.fixture(scope="module")
def server():
    """An S3 server with one empty bucket `shop`, reached by the usual variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    variables = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "eu-central-1",
                 "AWS_EC2_METADATA_DISABLED": "true"}
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items(): patch.setenv(name, value)
            wait_for(port, process)
            make_bucket("shop")
            yield port
    finally:
        process.terminate()
        process.wait()


def wait_for(port: int, process: subprocess.Popen) -> None:
    for _ in range(300):
        if process.poll() is not None: raise RuntimeError("the S3 server ended at its start")
        try: return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError: time.sleep(.1)
    raise TimeoutError("the S3 server did not start within 30 s")


def make_bucket(name: str) -> None: fs.FileSystem.from_uri(f"s3://{name}?allow_bucket_creation=true")[0].create_dir(name)


def make_bundle(folder: Path, value: int = 1) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights.npy").write_bytes(bytes([value]) * 3_000_000)  # more than one part of a stream
    (folder / "vocabulary.json").write_text('["bread", "milk", "tea"]')
    write_manifest(folder, name="recommend", kind="popularity", metrics={"hr@10": value / 10})
    return folder


class Shop:
    """A store below a prefix of its own, and the bucket's side of it."""
    def __init__(self, name: str, tmp_path: Path):
        self.root, self.tmp = f"shop/{name}/models", tmp_path
        self.store, self.files = ModelStore(f"s3://{self.root}"), fs.FileSystem.from_uri("s3://shop")[0]

    def publish(self, version: str): return self.store.publish(make_bundle(self.tmp / f"b{version}", int(version)), "recommend", version)
    def objects(self) -> list[str]:
        found = self.files.get_file_info(fs.FileSelector(self.root, recursive=True, allow_not_found=True))
        return sorted(info.path.removeprefix(self.root + "/") for info in found if info.is_file)

    def read(self, path: str) -> bytes:
        with self.files.open_input_stream(f"{self.root}/{path}") as stream: return stream.read()

    def write(self, path: str, data: bytes) -> None:
        with self.files.open_output_stream(f"{self.root}/{path}") as stream: stream.write(data)


@pytest.fixture
def shop(server, tmp_path) -> Shop: return Shop(tmp_path.name, tmp_path)


def flip(data: bytes) -> bytes: return data[:-1] + bytes([data[-1] ^ 1])


def test_from_publish_to_rollback(shop):
    assert (shop.store.names(), shop.store.versions("recommend"), shop.store.champion("recommend")) == ([], [], None)
    for version in ("2", "10"): shop.publish(version)
    assert (shop.store.names(), shop.store.versions("recommend")) == (["recommend"], ["2", "10"])
    assert shop.objects() == [f"recommend/{v}/{file}" for v in ("10", "2") for file in ("manifest.json", "model/weights.npy", "vocabulary.json")]
    for version in ("2", "10"): shop.store.promote("recommend", version, f"try {version}")
    assert (shop.store.champion("recommend")["version"], shop.store.champion("recommend")["previous"]) == ("10", "2")
    assert shop.store.rollback("recommend", "sales fell") == "2"
    with pytest.raises(UsageError, match="no earlier champion"): shop.store.rollback("recommend")
    history = [(p["action"], p["version"], p["reason"]) for p in shop.store.history("recommend")]
    assert history == [("promote", "2", "try 2"), ("promote", "10", "try 10"), ("rollback", "2", "sales fell")]


def test_the_bucket_holds_what_a_folder_would(shop):
    """The same layout and bytes, so that one can be copied to the other with any tool."""
    shop.publish("1")
    local = ModelStore(shop.tmp / "models")
    local.publish(shop.tmp / "b1", "recommend", "1")
    for path in shop.objects(): assert shop.read(path) == (shop.tmp / "models" / path).read_bytes()
    assert shop.objects() == sorted(p.relative_to(shop.tmp / "models").as_posix() for p in (shop.tmp / "models").rglob("*") if p.is_file())


def test_fetch_caches_by_digest_and_heals(shop):
    stamped, cache = shop.publish("1"), shop.tmp / "cache"
    folder = shop.store.fetch("recommend", "1", cache)
    assert verify(folder) == stamped and folder.is_relative_to(cache)
    (folder / "model" / "weights.npy").write_bytes(b"rotten")
    assert verify(shop.store.fetch("recommend", "1", cache)) == stamped
    shop.files.delete_file(f"{shop.root}/recommend/1/model/weights.npy")  # to load it again would fail
    assert shop.store.fetch("recommend", "1", cache) == folder
    assert not list(cache.rglob(".incoming-*"))


def test_fetch_goes_to_the_home_by_default(shop, home):
    shop.publish("1")
    assert shop.store.fetch("recommend", "1").is_relative_to(home / "cache")


def test_many_readers_share_a_cache(shop):
    stamped = shop.publish("1")
    with ThreadPoolExecutor(4) as pool: folders = set(pool.map(lambda _: ModelStore(shop.store.location).fetch("recommend", "1", shop.tmp / "cache"), range(8)))
    assert len(folders) == 1 and verify(folders.pop()) == stamped
    assert [p.name for p in (shop.tmp / "cache" / "recommend").iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("file", ["model/weights.npy", "vocabulary.json", "manifest.json"])
def test_one_flipped_bit_in_the_bucket_is_refused(shop, file):
    for version in "12": shop.publish(version)
    for version in "12": shop.store.promote("recommend", version)
    before = shop.store.champion("recommend")
    shop.write(f"recommend/1/{file}", flip(shop.read(f"recommend/1/{file}")))
    for act, words in ((shop.store.promote, ["1"]), (shop.store.rollback, []), (shop.store.fetch, ["1", shop.tmp / "cache"])):
        with pytest.raises(BundleError, match=f"bundle s3://shop/.*/recommend/1: '{file}'"): act("recommend", *words)
    assert shop.store.champion("recommend") == before
    assert not list((shop.tmp / "cache").rglob("*.npy"))  # nothing unfit stays in the cache


def test_a_missing_object_is_named(shop):
    shop.publish("1")
    shop.files.delete_file(f"{shop.root}/recommend/1/model/weights.npy")
    with pytest.raises(BundleError, match="recommend/1: 'model/weights.npy' is missing"): shop.store.promote("recommend", "1")


def test_another_sealed_bundle_in_the_champions_place_is_refused(shop):
    shop.publish("1")
    shop.store.promote("recommend", "1")
    other = make_bundle(shop.tmp / "other", 9)
    write_manifest(other, name="recommend", kind="popularity", version="1")
    for file in ("model/weights.npy", "vocabulary.json", "manifest.json"): shop.write(f"recommend/1/{file}", (other / file).read_bytes())
    with pytest.raises(BundleError, match="not the one that was promoted"): shop.store.fetch("recommend", "1", shop.tmp / "cache")


def test_a_version_is_never_overwritten(shop):
    shop.publish("1")
    before = {path: shop.read(path) for path in shop.objects()}
    shop.store.publish(shop.tmp / "b1", "recommend", "1")  # the same again is fine
    with pytest.raises(UsageError, match="never overwritten"): shop.store.publish(make_bundle(shop.tmp / "other", 9), "recommend", "1")
    assert {path: shop.read(path) for path in shop.objects()} == before


def test_an_upload_that_broke_off_is_no_version(shop, monkeypatch):
    place = shop.store._place

    def broken(path, data): raise ConnectionError("the line is dead")

    monkeypatch.setattr(place, "write", broken)
    with pytest.raises(ConnectionError): shop.publish("1")
    monkeypatch.undo()
    assert "recommend/1/model/weights.npy" in shop.objects()  # the files came first
    assert (shop.store.names(), shop.store.versions("recommend")) == ([], [])
    with pytest.raises(UsageError, match="no version '1'; published are none"): shop.store.promote("recommend", "1")
    shop.store.publish(shop.tmp / "b1", "recommend", "1")
    assert shop.store.promote("recommend", "1")["version"] == "1"


def test_promoters_at_the_same_moment(shop):
    for version in "12": shop.publish(version)
    def race(number): return [ModelStore(shop.store.location).promote("recommend", "12"[(number + step) % 2], f"{number}.{step}") for step in range(5)]
    with ThreadPoolExecutor(3) as pool: list(pool.map(race, range(3)))
    history, record = {p["id"]: p for p in shop.store.history("recommend")}, shop.store.champion("recommend")
    assert record == history[record["id"]]
    while record["parent"]:
        assert history[record["parent"]]["version"] == record["previous"]
        record = history[record["parent"]]


def test_serving_reads_the_bucket_in_a_process_of_its_own(shop):
    """Nothing but the address and the AWS variables pass between the two."""
    shop.publish("1")
    shop.store.promote("recommend", "1")
    code = "from shopai.core.artifacts import ModelStore as S; s = S.from_settings(); print(s.fetch('recommend', s.champion('recommend')['version']))"
    environment = {**os.environ, "SHOPAI_MODEL_STORE": shop.store.location, "SHOPAI_HOME": str(shop.tmp / "home")}
    folder = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout.strip()
    assert verify(folder).version == "1" and folder.startswith(str(shop.tmp / "home"))


def test_mistakes_in_the_address(server, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="keys do not belong into the address") as caught: ModelStore("s3://me:sesame@shop/models")
    assert "sesame" not in str(caught.value)
    missing = ModelStore("s3://no-such-bucket/models")
    assert (missing.names(), missing.champion("recommend")) == ([], None)
    with pytest.raises(OSError, match="(?i)bucket"): missing.publish(make_bundle(tmp_path / "b"), "recommend", "1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="needs pyarrow; pip install pyarrow"): ModelStore("s3://shop/models")


def test_a_trailing_slash_and_a_bare_bucket(server, tmp_path):
    make_bundle(tmp_path / "b")
    ModelStore("s3://shop/slash/").publish(tmp_path / "b", "recommend", "1")
    assert ModelStore("s3://shop/slash").versions("recommend") == ["1"]
    make_bucket("bare")
    ModelStore("s3://bare").publish(tmp_path / "b", "recommend", "1")
    assert ModelStore("s3://bare/").names() == ["recommend"]
    shutil.rmtree(tmp_path / "b")
    assert ModelStore("s3://bare").check("recommend", "1").name == "recommend"
