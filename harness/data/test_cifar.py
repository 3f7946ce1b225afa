"""Tests of harness/data/cifar.py: both file formats, whole, damaged and hostile, and the download."""

import functools
import hashlib
import io
import pickle
import shutil
import struct
import tarfile

import numpy as np
import pytest

from harness.data.cifar import CIFAR, download_cifar, read_cifar, read_file
from harness.fuzz import Exploit, accepted, case, cases, damaged
from pdarts import InputError

# --- reading ----------------------------------------------------------------------------------------------------------


def write_cifar(folder, name, binary, rows=10):
    """A CIFAR data set with `rows` random images in each file, in the published layout."""
    form, rng, written = CIFAR[name], np.random.default_rng(0), []
    target = folder / (form.binary if binary else form.python)
    target.mkdir(parents=True)
    for file in form.train + form.test:
        x, y = rng.integers(0, 256, (rows, 3072), np.uint8), rng.integers(0, form.classes, rows)
        written.append((x, y))
        if binary:
            coarse = [np.full((rows, 1), 99, np.uint8)] * (form.label_bytes - 1)
            (target / f"{file}.bin").write_bytes(np.concatenate([*coarse, y[:, None].astype(np.uint8), x], 1).tobytes())
        else:
            (target / file).write_bytes(python2_pickle({form.label_key: y.tolist()}, x))
    train = [np.concatenate([part[i] for part in written[:-1]]) for i in (0, 1)]
    return train, written[-1]


def python2_pickle(entries, x):
    """A pickle as Python 2 and numpy 1 wrote it: byte strings, numpy.core.multiarray."""
    state = struct.pack("<B", 40) + b"K\x01(" + b"".join(b"M" + struct.pack("<H", n) for n in x.shape) + b"t"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R" + state + dtype
    array += b"\x89T" + struct.pack("<i", x.nbytes) + x.tobytes() + b"tb"
    items = b"U\x04data" + array
    for key, value in entries.items():
        items += b"U" + bytes([len(key)]) + key + pickle.dumps(value, 2)[2:-1]
    return b"\x80\x02}(" + items + b"u."


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("binary", [True, False])
def test_cifar_is_read_in_both_versions(tmp_path, name, binary):
    train, test = write_cifar(tmp_path, name, binary)
    for array, expected in zip(read_cifar(name, tmp_path), (*train, *test), strict=True):
        if array.ndim == 4:
            assert array.dtype == np.uint8 and array.shape[1:] == (32, 32, 3)
            array = array.transpose(0, 3, 1, 2).reshape(-1, 3072)
        assert np.array_equal(array, expected)


@pytest.mark.parametrize(
    "content",
    [
        lambda path: pickle.dumps({b"data": Exploit(path), b"labels": [0]}, 2),
        lambda path: b"cbuiltins\neval\n(S'1'\ntR.",
        lambda path: pickle.dumps({b"labels": [0]}, 2),
        lambda path: pickle.dumps([1, 2], 2),
        lambda path: python2_pickle({b"labels": [0, 1, 2]}, np.zeros((2, 3072), np.uint8)),
        lambda path: python2_pickle({b"labels": [0, 99]}, np.zeros((2, 3072), np.uint8)),
        lambda path: python2_pickle({b"labels": [0, 1]}, np.zeros((2, 3072), np.uint8))[:-900],
        lambda path: b"",
    ],
)
def test_a_pickle_that_holds_anything_else_is_refused_and_runs_nothing(tmp_path, content):
    write_cifar(tmp_path, "cifar10", binary=False)
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(content(tmp_path / "exploited"))
    with pytest.raises(InputError, match="data_batch_3.*expected"):
        read_cifar("cifar10", tmp_path)
    assert not (tmp_path / "exploited").exists()


def test_truncated_and_missing_binary_files_are_named(tmp_path):
    write_cifar(tmp_path, "cifar10", binary=True)
    file = tmp_path / "cifar-10-batches-bin/data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"data_batch_2.bin has 30729 bytes; expected a multiple of 3073"):
        read_cifar("cifar10", tmp_path)
    file.unlink()
    with pytest.raises(InputError, match="cannot read .*data_batch_2.bin"):
        read_cifar("cifar10", tmp_path)


# --- download ---------------------------------------------------------------------------------------------------------


def archive(folder, name="cifar10", links=False):
    """A downloadable archive of a small CIFAR and its form."""
    write_cifar(folder / "made", name, binary=True)
    form, path = CIFAR[name], folder / "made.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder / "made" / form.binary, form.binary)
        evil = tarfile.TarInfo("../evil")
        evil.size = 4
        tar.addfile(evil, io.BytesIO(b"evil"))
        if links:
            link = tarfile.TarInfo(f"{form.binary}/test_batch.bin")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    return form._replace(url=path.as_uri(), md5=hashlib.md5(path.read_bytes()).hexdigest())


def test_download_checks_the_sum_unpacks_only_the_data_and_leaves_nothing_else(tmp_path):
    form, target = archive(tmp_path), tmp_path / "target"
    with pytest.raises(InputError, match="has MD5 .* expected 0000"):
        download_cifar("cifar10", target, form._replace(md5="0000"))
    with pytest.raises(InputError, match="cannot fetch"):
        download_cifar("cifar10", target, form._replace(url=(tmp_path / "missing").as_uri()))
    assert list(target.iterdir()) == []
    download_cifar("cifar10", target, form)
    assert [p.name for p in target.iterdir()] == ["cifar-10-batches-bin"]
    assert len(list((target / "cifar-10-batches-bin").iterdir())) == 6 and not (tmp_path / "evil").exists()
    assert len(read_cifar("cifar10", target)[0]) == 50
    download_cifar("cifar10", target, form._replace(url="https://never.invalid/"))  # there already


def test_download_refuses_links_in_the_archive(tmp_path):
    form = archive(tmp_path, links=True)
    with pytest.raises(InputError, match="test_batch.bin is not a file.*expected"):
        download_cifar("cifar10", tmp_path / "target", form)
    assert list((tmp_path / "target").iterdir()) == []


# --- damaged, hostile and random input --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CIFAR)
def test_random_binary_cifar_files_give_the_images_in_them_or_are_refused(tmp_path, limits, name):
    write_cifar(tmp_path, name, binary=True, rows=4)
    form, taken = CIFAR[name], 0
    files = {path: path.read_bytes() for path in sorted((tmp_path / form.binary).iterdir())}
    row = form.label_bytes + 3072
    for number, rng in cases(75):
        path = rng.choice(list(files))
        content = files[path][: row * rng.randrange(5)] if rng.random() < 0.3 else damaged(files[path], rng)
        path.write_bytes(content)
        with case(number):
            read = accepted(read_cifar, name, tmp_path)
            rows = [np.frombuffer(p.read_bytes()[: len(p.read_bytes()) // row * row], np.uint8) for p in files]
            rows = [r.reshape(-1, row) for r in rows]
            labels = np.concatenate(rows)[:, form.label_bytes - 1]
            fits = content and len(content) % row == 0 and labels.max() < form.classes
            train = np.concatenate([r for p, r in zip(files, rows) if "test" not in p.name])
            assert (read is not None) == bool(fits)
            if read is not None:
                taken += 1
                assert np.array_equal(read[0].transpose(0, 3, 1, 2).reshape(-1, 3072), train[:, form.label_bytes :])
                assert np.array_equal(read[1], train[:, form.label_bytes - 1])
        path.write_bytes(files[path])
    assert taken > 20


def hostile_pickles(path):
    """Pickles that call, or that take all time or memory, in place of a whole file or as its labels."""
    for code in range(256):
        yield b"\x80\x04(" + bytes([code]) + b"\xff\xff\xff\x7f\x00\x00\x00\x00" * 2 + b"\n" * 4 + b"t}."
    nested = b"\x80\x02)" + b"2\x86" * 60  # a tuple of twice a tuple of twice a tuple ...
    yield from (nested + end for end in (b".", b"}" + nested[2:] + b"K\x00s.", b"(" + nested[2:] + b"K\x00d."))
    yield from (b"(" + nested[2:] + end for end in (b"\x91.", b"\x8f(" + nested[2:] + b"\x90."))
    x = np.zeros((2, 3072), np.uint8)
    lists = functools.reduce(lambda inner, _: [inner, inner], range(30), [0, 0])
    wrong = [0.5, 1], ["0", "1"], [True, False], [0, 10**30], [0, None], (0, 1), {0: 1}, [[0], [1]], "01"
    for labels in lists, *wrong:
        yield python2_pickle({b"labels": labels}, x)
    for call in (Exploit(path), [Exploit(path)], {Exploit(path): 0}):
        yield from (pickle.dumps({b"data": x.tobytes(), b"labels": call}, protocol) for protocol in range(6))
    for call in (b"cos\nsystem\n", b"cbuiltins\nexec\n", b"cnumpy\nload\n", b"cnumpy.core.multiarray\nexec\n"):
        yield call + b"(S'touch " + bytes(path) + b"'\ntR."
        yield b"(S'touch " + bytes(path) + b"'\n" + call.replace(b"c", b"i", 1) + b"."


@pytest.mark.parametrize("name", CIFAR)
def test_random_cifar_pickles_give_the_images_in_them_or_are_refused(tmp_path, limits, name):
    write_cifar(tmp_path, name, binary=False, rows=4)
    form, taken, reader = CIFAR[name], 0, read_file
    path = tmp_path / form.python / form.test[0]
    whole = path.read_bytes()
    for number, content in enumerate(hostile_pickles(tmp_path / "exploited")):
        with case("hostile", number):
            path.write_bytes(content)
            assert accepted(reader, path, form, False) is None
    for number, rng in cases(300):
        # Most of a file is pixels, all that can be damaged lies around them.
        x = whole.index(b"T" + struct.pack("<i", 4 * 3072)) + 5
        parts = [whole[:x], whole[x : x + 4 * 3072], whole[x + 4 * 3072 :]]
        which = rng.choice((0, 0, 1, 2))
        parts[which] = damaged(parts[which], rng)
        path.write_bytes(b"".join(parts))
        with case(number):
            read = accepted(reader, path, form, False)
            if read is not None:
                taken += 1
                assert read[0].shape == (len(read[1]), 3, 32, 32) and set(read[1]) <= set(range(form.classes))
                assert read[0].tobytes() in path.read_bytes()
    assert taken > 10 and [p.name for p in tmp_path.iterdir()] == [form.python]


def test_random_archives_are_unpacked_whole_or_leave_nothing(tmp_path, limits):
    write_cifar(tmp_path / "made", "cifar10", binary=True, rows=1)
    form, target, path, taken = CIFAR["cifar10"], tmp_path / "target", tmp_path / "archive", 0
    files = {f"{form.binary}/{p.name}": p.read_bytes() for p in (tmp_path / "made" / form.binary).iterdir()}
    path.touch()
    target.mkdir()
    before = set(tmp_path.rglob("*"))
    links = [*files, "evil", "..", "/etc/passwd", str(tmp_path), "test_batch.bin", "x" * 90]
    names = [*files, form.binary, "../evil", f"{form.binary}/../../evil", str(tmp_path / "evil"), "evil", "x" * 90]
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
    for number, rng in cases(100):
        members = [(name, tarfile.REGTYPE, content) for name, content in files.items()]
        for _ in range(rng.randrange(4)):
            members.append((rng.choice(names), rng.choice([*kinds, tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE]), b""))
        if number % 2:
            rng.shuffle(members)
        with tarfile.open(path, rng.choice(("w", "w:gz")), format=rng.randrange(3)) as tar:
            for name, kind, content in members:
                member = tarfile.TarInfo(name)
                member.type, member.linkname, member.size = kind, rng.choice(links), len(content)
                tar.addfile(member, io.BytesIO(content))
        last = {name: (kind, content) for name, kind, content in members}  # as tar does
        right = {name: last[name][1] for name in files if last[name][0] == tarfile.REGTYPE}
        whole = rng.random() < 0.6
        if not whole:
            path.write_bytes(damaged(path.read_bytes(), rng))
        this = form._replace(url=path.as_uri(), md5=hashlib.md5(path.read_bytes()).hexdigest())
        with case(number):
            accepted(download_cifar, "cifar10", target, this)
            written = set(tmp_path.rglob("*")) - before
            if not whole and written:  # no more is known than that it is all there
                assert {p.name for p in written} == {form.binary, *(name.split("/")[1] for name in files)}
            elif whole:
                right = right if right.keys() == files.keys() else {}
                assert {p.relative_to(target).as_posix(): p.read_bytes() for p in written if p.is_file()} == right
            taken += bool(written)
            assert not any(p.is_symlink() for p in written)
        shutil.rmtree(target)
        target.mkdir()
    assert taken > 20
