"""Bundles and the model store under attack: every byte flipped, hostile manifests, killed publishers, writers at the same moment."""
import hashlib
import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shopai
from shopai.core.artifacts import BundleError, ModelStore, verify, write_manifest
from shopai.core.config import UsageError
from shopai.core.manifest import code_version, parse_manifest

MANIFEST = "manifest.json"


def make_bundle(folder: Path, value: int = 1) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights.npy").write_bytes(bytes([value]) * 40)
    (folder / "vocabulary.json").write_text('["bread", "milk", "tea"]')
    write_manifest(folder, name="recommend", kind="popularity", created="2011-12-10T00:00:00Z", metrics={"hr@10": .25}, parameters={"note": "Käse ✓"})
    return folder


def seal(fields: dict) -> bytes:
    """The manifest's text, written anew from its description: SHA-256 over the fields as sorted JSON, itself a field of the readable JSON."""
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    return (json.dumps({**fields, "seal": digest}, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def fields_of(bundle: Path) -> dict:
    fields = json.loads((bundle / MANIFEST).read_text())
    del fields["seal"]
    return fields


@pytest.fixture
def bundle(tmp_path: Path) -> Path: return make_bundle(tmp_path / "bundle")


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """One bundle that is spoilt and mended again, and its genuine bytes."""
    folder = make_bundle(tmp_path_factory.mktemp("target") / "bundle")
    return folder, {file: (folder / file).read_bytes() for file in ("model/weights.npy", "vocabulary.json", MANIFEST)}


def refused(target, file: str, data: bytes) -> None:
    """`verify` refuses the bundle with `data` in place of `file`, and its one line names the file."""
    folder, genuine = target
    assert data != genuine[file]
    (folder / file).write_bytes(data)
    try:
        with pytest.raises(BundleError) as caught: verify(folder)
    finally: (folder / file).write_bytes(genuine[file])
    assert file in str(caught.value) and "\n" not in str(caught.value)


def test_every_single_byte_counts(target):
    _, genuine = target
    for file, data in genuine.items():
        for position, byte in enumerate(data): refused(target, file, data[:position] + bytes([byte ^ (1 << position % 8)]) + data[position + 1:])
    assert verify(target[0]).metrics == {"hr@10": .25}


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_other_content_is_refused(target, data):
    file = data.draw(st.sampled_from(sorted(target[1])))
    genuine = target[1][file]
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(genuine))] * 2)))
    changed = genuine[:start] + data.draw(st.binary(max_size=8)) + genuine[end:]
    if changed != genuine: refused(target, file, changed)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON_VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_sealed_manifest_with_any_value_is_read_the_same_or_refused(target, data):
    fields = json.loads(target[1][MANIFEST])
    del fields["seal"]
    fields[data.draw(st.sampled_from(sorted(fields)) | st.text())] = data.draw(JSON_VALUES)
    try: raw = seal(fields)
    except UnicodeEncodeError: return  # half a surrogate pair: no file can hold it
    try: manifest = parse_manifest(raw, "hostile")
    except BundleError as error: assert MANIFEST in str(error)
    else: assert manifest.model_dump() == fields


@given(st.binary(max_size=60) | st.text().map(lambda text: text.encode(errors="replace")) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=300, deadline=None)
def test_whatever_lies_in_the_manifest_is_refused_in_one_way(raw):
    with pytest.raises(BundleError): parse_manifest(raw, "hostile")


BOMBS = {"deep": b"[" * 100_000, "huge": b'{"schema_version": ' + b"9" * 5_000 + b"}", "utf-16": "{}".encode("utf-16"), "bom": b"\xef\xbb\xbf{}", "empty": b""}


@pytest.mark.parametrize("raw", BOMBS.values(), ids=BOMBS)
def test_json_bombs_are_refused(raw):
    with pytest.raises(BundleError, match="manifest.json"): parse_manifest(raw, "hostile")


@pytest.mark.parametrize("path", ["../outside.json", "/etc/outside.json", "model/../../outside.json", "model\\x.json", "C:/x.json", "~/x.json",
                                  "model/./x.json", ".x.json", "weights.pkl", "x.json\n"])
def test_a_forged_manifest_leads_nowhere(bundle, path):
    """The forger seals correctly and the file he points at exists with the right digest: the path alone is the reason."""
    (bundle.parent / "outside.json").write_text("secret")
    forged = fields_of(bundle)
    forged["files"][path] = hashlib.sha256(b"secret").hexdigest()
    (bundle / MANIFEST).write_bytes(seal(forged))
    with pytest.raises(BundleError, match="plain relative path|may hold code") as caught: verify(bundle)
    assert repr(path)[1:-1] in repr(str(caught.value))


def test_the_forger_of_the_test_above_seals_as_the_package_does(bundle):
    assert seal(fields_of(bundle)) == (bundle / MANIFEST).read_bytes()


def add_file(bundle): (bundle / "notes.txt").write_text("hello")
def add_fifo(bundle): os.mkfifo(bundle / "pipe.json")
def add_link(bundle): (bundle / "model" / "more.json").symlink_to(bundle / "vocabulary.json")
def remove_a_file(bundle): (bundle / "vocabulary.json").unlink()
def remove_the_manifest(bundle): (bundle / MANIFEST).unlink()
def add_linked_folder(bundle): (bundle / "more").symlink_to(bundle / "model", target_is_directory=True)
def add_dangling_link(bundle): (bundle / "more.json").symlink_to("nowhere")
def swap_for_a_link(bundle, file="vocabulary.json"): (bundle / file).symlink_to((bundle / file).rename(bundle.parent / file))
def link_the_manifest(bundle): swap_for_a_link(bundle, MANIFEST)


def make_the_manifest_a_folder(bundle):
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).mkdir()


LINKS = [(add_link, "model/more.json"), (add_linked_folder, "more"), (add_dangling_link, "more.json"), (swap_for_a_link, "vocabulary.json"),
         (link_the_manifest, MANIFEST), (add_fifo, "pipe.json")]
OTHERS = [(add_file, "notes.txt"), (remove_a_file, "vocabulary.json"), (remove_the_manifest, MANIFEST), (make_the_manifest_a_folder, MANIFEST)]


@pytest.mark.timeout(60)  # a reader that opens the named pipe waits for ever
@pytest.mark.parametrize("spoil, file", LINKS + OTHERS)
def test_exactly_the_listed_plain_files(bundle, spoil, file):
    spoil(bundle)
    with pytest.raises(BundleError, match=f"'{file}'"): verify(bundle)
    if (spoil, file) in LINKS:
        with pytest.raises(BundleError, match=f"'{file}' is a link or a device"): write_manifest(bundle, name="recommend", kind="x")


class Bomb:
    def __init__(self, path: str): self.path = path
    def __reduce__(self): return (os.mkdir, (self.path,))


def test_no_pickle_runs(bundle, tmp_path):
    """A pickle by its own name is refused; one that calls itself .npy gets through `verify`, being data to it, and NumPy refuses it."""
    bomb = pickle.dumps(Bomb(str(tmp_path / "boom")))
    (bundle / "model.pkl").write_bytes(bomb)
    with pytest.raises(BundleError, match="model.pkl.*may hold code"): write_manifest(bundle, name="recommend", kind="x")
    (bundle / "model.pkl").rename(bundle / "model.npy")
    write_manifest(bundle, name="recommend", kind="x")
    verify(bundle)
    with pytest.raises(ValueError, match="contains pickled"): np.load(bundle / "model.npy", allow_pickle=False)
    assert not (tmp_path / "boom").exists()
    pickle.loads(bomb)  # noqa: S301 -- the bomb is live
    assert (tmp_path / "boom").exists()


# ---- code version ----------------------------------------------------------------------------------------------------------------------------

def version_seen(site: Path) -> str:
    """`code_version()` of the package copied to `site`."""
    copied = site / "shopai"
    if not copied.exists(): shutil.copytree(Path(shopai.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""if True:
        import sys; sys.path.insert(0, {str(site)!r})
        import shopai.core.manifest as module
        assert module.shopai.__file__.startswith({str(site)!r})
        print(module.code_version())"""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=site, env=environment).stdout.strip()


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True).stdout.strip()


def test_code_version_in_a_checkout_and_elsewhere(tmp_path):
    assert version_seen(tmp_path) == shopai.__version__
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "shopai")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert version_seen(tmp_path) == f"{shopai.__version__}+g{commit}"
    with open(tmp_path / "shopai" / "__init__.py", "a") as file: file.write("\n# changed\n")
    assert version_seen(tmp_path) == f"{shopai.__version__}+g{commit}-dirty"
    inner = tmp_path / ".venv" / "site-packages"  # installed inside somebody else's checkout: his commit says nothing about our code
    inner.mkdir(parents=True)
    assert version_seen(inner) == shopai.__version__


def test_code_version_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert code_version() == shopai.__version__


# ---- the store -------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def store(tmp_path) -> ModelStore:
    store = ModelStore(tmp_path / "models")
    for version in "1234": store.publish(make_bundle(tmp_path / f"b{version}", int(version)), "recommend", version)
    return store


@given(steps=st.lists(st.sampled_from(["1", "2", "3", "4", "rollback"]), max_size=14))
@settings(max_examples=40, deadline=None)
def test_rollback_is_the_undo_of_a_stack(tmp_path_factory, steps):
    """Against the obvious model: a stack, on which promoting the top again changes nothing."""
    root, stack = tmp_path_factory.mktemp("undo"), []
    store = ModelStore(root / "models")
    for version in "1234": store.publish(make_bundle(root / version, int(version)), "recommend", version)
    for step in steps:
        if step == "rollback":
            if len(stack) < 2:
                with pytest.raises(UsageError, match="no earlier champion"): store.rollback("recommend")
            else:
                stack.pop()
                assert store.rollback("recommend") == stack[-1]
        else:
            store.promote("recommend", step, "because")
            if stack[-1:] != [step]: stack.append(step)
        champion = store.champion("recommend")
        assert (champion and champion["version"]) == (stack[-1] if stack else None)
        assert (champion and champion["previous"]) == (stack[-2] if len(stack) > 1 else None)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_version_is_neither_promoted_nor_returned_to_nor_fetched(store):
    for version in "12": store.promote("recommend", version)
    flip_last_byte(Path(store.location) / "recommend" / "1" / "model" / "weights.npy")
    before = store.champion("recommend"), store.history("recommend")
    for act in (store.promote, store.fetch, store.check):
        with pytest.raises(BundleError, match="recommend/1: 'model/weights.npy'"): act("recommend", "1")
    with pytest.raises(BundleError, match="recommend/1: 'model/weights.npy'"): store.rollback("recommend")
    assert (store.champion("recommend"), store.history("recommend")) == before
    assert store.promote("recommend", "3")["previous"] == "2"  # a sound version still gets through


def test_a_version_is_never_overwritten_not_even_a_damaged_one(store, tmp_path):
    with pytest.raises(UsageError, match="never overwritten"): store.publish(tmp_path / "b2", "recommend", "1")
    weights = Path(store.location) / "recommend" / "1" / "model" / "weights.npy"
    flip_last_byte(weights)
    damaged = weights.read_bytes()
    with pytest.raises(BundleError, match="weights.npy"): store.publish(tmp_path / "b1", "recommend", "1")
    assert weights.read_bytes() == damaged


def test_a_damaged_bundle_is_not_published(store, tmp_path):
    flip_last_byte(make_bundle(tmp_path / "b5") / "vocabulary.json")
    with pytest.raises(BundleError, match="b5: 'vocabulary.json'"): store.publish(tmp_path / "b5", "recommend", "5")
    assert store.versions("recommend") == ["1", "2", "3", "4"]


@pytest.mark.parametrize("change", [{"version": "../../etc"}, {"parent": "../../../etc/passwd"}, {"id": "x"}, {"manifest_sha256": "0"},
                                    {"promoted_at": "yesterday"}, {"colour": "red"}, "half"])
def test_a_hostile_or_half_champion_file_is_refused(store, change):
    champion = Path(store.location) / "recommend" / "champion.json"
    fields = store.promote("recommend", "1")
    champion.write_text(json.dumps(fields)[:40] if change == "half" else json.dumps(fields | change))
    for act in (lambda: store.champion("recommend"), lambda: store.rollback("recommend"), lambda: store.fetch("recommend", "1")):
        with pytest.raises(BundleError, match="'champion.json' is damaged"): act()


def test_files_are_open_to_other_users(store):
    """Serving may run as another user than training."""
    os.umask(umask := os.umask(0))
    store.promote("recommend", "1")
    for path in Path(store.location).rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o644) & ~umask & 0o777
        assert stat.S_IMODE(path.stat().st_mode) & wanted == wanted, path


KILLED = """
    import os, shutil, signal, sys
    from pathlib import Path
    from shopai.core import artifacts
    copy = shutil.copyfile
    def copy_and_die(source, target):
        copy(source, target)
        os.kill(os.getpid(), signal.SIGKILL)
    artifacts.shutil.copyfile = copy_and_die
    artifacts.ModelStore(sys.argv[1]).publish(sys.argv[2], "recommend", "5")
"""


def test_a_publisher_killed_half_way_leaves_no_version(store, tmp_path):
    make_bundle(tmp_path / "b5", 5)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), store.location, str(tmp_path / "b5")])
    assert done.returncode == -signal.SIGKILL
    assert list(Path(store.location).glob("recommend/.incoming-*/*"))  # it was in the midst of it
    assert store.versions("recommend") == ["1", "2", "3", "4"]
    with pytest.raises(UsageError, match="no version '5'"): store.promote("recommend", "5")
    store.publish(tmp_path / "b5", "recommend", "5")
    assert store.promote("recommend", "5")["version"] == "5"


def test_killed_between_record_and_champion_changes_nothing(store, monkeypatch):
    store.promote("recommend", "1")
    write = store._place.write

    def die(path, data):
        if path.endswith("champion.json"): raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(store._place, "write", die)
    with pytest.raises(KeyboardInterrupt): store.promote("recommend", "2")
    monkeypatch.undo()
    assert store.champion("recommend")["version"] == "1" and len(store.history("recommend")) == 2
    assert store.promote("recommend", "3")["previous"] == "1" and store.rollback("recommend") == "1"


PROMOTER = """
    import sys
    from shopai.core.artifacts import ModelStore
    store = ModelStore(sys.argv[1])
    for step in range(40): store.promote("recommend", "1234"[(step + int(sys.argv[2])) % 4], f"{sys.argv[2]}.{step}")
"""


def test_promoters_at_the_same_moment_leave_whole_files_and_a_whole_chain(store):
    """Three processes promote in a race while this one reads: no half file is ever seen, the last one wins, and rolling back reaches the first."""
    racers = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(PROMOTER), store.location, str(number)]) for number in range(3)]
    seen = set()
    while any(racer.poll() is None for racer in racers):
        if champion := store.champion("recommend"): seen.add(champion["id"])
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    history, champion = {p["id"]: p for p in store.history("recommend")}, store.champion("recommend")
    assert len(seen) > 5 and seen <= history.keys() and champion == history[champion["id"]]
    length, record = 0, champion
    while record["parent"]:
        assert history[record["parent"]]["version"] == record["previous"]
        record, length = history[record["parent"]], length + 1
    for _ in range(length): last = store.rollback("recommend")
    assert last == record["version"]
    with pytest.raises(UsageError, match="no earlier champion"): store.rollback("recommend")
    assert not list(Path(store.location).rglob(".*"))


def test_publishers_at_the_same_moment_one_wins_or_all_agree(store, tmp_path):
    make_bundle(tmp_path / "a", 7)
    make_bundle(tmp_path / "b", 8)
    for version in map(str, range(10, 20)):
        def publish(folder, version=version):
            try: return store.publish(folder, "recommend", version).files
            except UsageError as error: return str(error)

        with ThreadPoolExecutor(4) as pool: answers = list(pool.map(publish, [tmp_path / "a", tmp_path / "b"] * 2))
        won = [answer for answer in answers if isinstance(answer, dict)]
        assert len(won) == 2 and won[0] == won[1] == store.check("recommend", version).files
        assert all("never overwritten" in answer for answer in answers if isinstance(answer, str))
    assert not list(Path(store.location).rglob(".incoming-*"))


def test_a_folder_store_needs_no_heavy_library():
    heavy = {"numpy", "pandas", "pyarrow", "mlflow", "torch"}
    code = f"import sys, shopai.core.artifacts as a; a.ModelStore('.').names(); print({heavy} & {{*sys.modules}} or 'none')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "none"
