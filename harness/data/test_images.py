"""Tests of harness/data/images.py: arrays, .npz files, generated shapes, and the data of searches and evaluations."""

import dataclasses
import io
import pickle
import struct
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pdarts
from harness import files
from harness.conftest import ONE_NODE
from harness.data.cifar import CIFAR
from harness.data.images import Images, load, shapes
from harness.data.test_cifar import write_cifar
from harness.fuzz import Exploit, accepted, case, cases, damaged
from harness.settings import EvaluateSettings, SearchSettings
from pdarts import EvaluateConfig, InputError, SearchConfig


def own_images(shape, classes=3, n=12):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (n, *shape), np.uint8), np.arange(n) % classes
    return Images.from_arrays(x, y, x, y)


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 13), (10, 11, 4)])
def test_own_data_of_any_shape_is_read_searched_and_evaluated(tmp_path, shape):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (12, *shape), np.uint8), np.arange(12) % 5
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x[:5], y_test=y[:5].astype(np.uint8))
    own = load(SearchSettings(dataset="shapes"), str(tmp_path / "own.npz"))
    channels = shape[2] if len(shape) == 3 else 1
    assert own.x_train.shape == (12, channels, *shape[:2]) and own.num_classes == 5
    levels = x.reshape(-1, channels) / 255
    assert own.mean.numpy() == pytest.approx(levels.mean(0)) and own.std.numpy() == pytest.approx(levels.std(0))
    config = SearchConfig(
        depths=(3,), keep=(8,), skip_dropout=(0.1,), channels=8, epochs=1, alpha_start=0, batch_size=4
    )
    genotype = pdarts.run(pdarts.Search, config, own.search_data(config), space=ONE_NODE).genotype()
    config = EvaluateConfig(depth=3, channels=8, epochs=1, batch_size=4)
    network = pdarts.run(pdarts.Evaluation, genotype, config, own.evaluate_data(config)).network
    correct, total = pdarts.correct_predictions(network, own.test())
    assert 0 <= correct <= total == 5


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("binary", [True, False])
def test_cifar_is_found_by_the_name_of_its_folder(tmp_path, name, binary):
    (x_train, y_train), (x_test, y_test) = write_cifar(tmp_path, name, binary)
    for dataset in name, "shapes":
        read = load(SearchSettings(dataset=dataset), str(tmp_path))
        assert (read.name, read.num_classes, read.path) == (name, CIFAR[name].classes, str(tmp_path))
        for array, expected in zip((read.x_train, read.y_train, read.x_test, read.y_test),
                                   (x_train.reshape(-1, 3, 32, 32), y_train, x_test.reshape(-1, 3, 32, 32), y_test)):
            assert np.array_equal(array.numpy(), expected)
        assert read.mean.tolist() == pytest.approx(CIFAR[name].mean)
        assert read.std.tolist() == pytest.approx(CIFAR[name].std)


def test_what_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "own.npz").touch()
    for arguments, message in (
        (["mnist"], "dataset is 'mnist'; expected shapes, imagenet, cifar10 or cifar100"),
        (["imagenet"], "no --data FOLDER; expected a folder with images in train/CLASS and val/CLASS"),
        (["imagenet", str(tmp_path)], "no train/CLASS and val/CLASS in .*; expected a folder with images"),
        (["shapes", "missing"], "no file or folder missing"),
        (["shapes", str(tmp_path)], "no data in .*; expected .*, or one of the folders cifar-10-batches-bin, .*100-py"),
        (["cifar10", str(tmp_path)], "no cifar10 in .*; expected a folder cifar-10-batches-bin or cifar-10-batches-py"),
        (["shapes", None, True], "nothing to download for shapes; expected --preset cifar10 or cifar100"),
        (["cifar10", str(tmp_path / "own.npz"), True], "nothing to download for .*own.npz"),
    ):
        with pytest.raises(InputError, match=message):
            load(SearchSettings(dataset=arguments[0]), *arguments[1:])
    with pytest.raises(InputError, match="fraction is 0.5; expected 1 but for a folder of images"):
        load(SearchSettings(dataset="shapes", fraction=0.5))
    with pytest.raises(InputError, match="no --data FOLDER; expected a folder"):
        load(EvaluateSettings(augment="imagenet"))


def test_a_preset_decides_between_data_sets_in_one_folder(tmp_path, monkeypatch):
    taken, here = [], str(tmp_path)
    monkeypatch.setattr("harness.data.images.load_folder", lambda path, *_: taken.append(path))

    def name(settings, *arguments):
        read = load(settings, here, *arguments)
        return read.name if read else taken.pop() and "folder"

    write_cifar(tmp_path, "cifar10", binary=True)
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    assert name(SearchSettings(dataset="cifar10")) == "cifar10"
    assert name(SearchSettings(dataset="cifar100")) == name(EvaluateSettings(dataset="imagenet")) == "folder"
    assert name(EvaluateSettings(dataset="cifar10", augment="imagenet")) == "folder"
    with pytest.raises(InputError, match=f"{here} holds cifar10 and train and val; expected one data set, or --pre"):
        load(SearchSettings(dataset="shapes"), here)
    monkeypatch.setattr("harness.data.images.download_cifar", write_cifar_100)
    assert name(SearchSettings(dataset="cifar100"), True) == "cifar100"
    for folder in "train", "val":
        (tmp_path / folder).rmdir()
    assert [name(SearchSettings(dataset=dataset)) for dataset in ("cifar10", "cifar100")] == ["cifar10", "cifar100"]
    with pytest.raises(InputError, match="holds cifar10 and cifar100; expected one data set"):
        load(SearchSettings(dataset="shapes"), here)


def write_cifar_100(name, folder):
    write_cifar(folder, "cifar100", binary=True)


@pytest.mark.parametrize("dataset", ["shapes", "cifar10", "imagenet"])
def test_classes_without_train_and_val_are_told_how_to_arrange_them(tmp_path, dataset):
    for name in "daisy", "rose", "tulip", "iris":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.tif").touch()
    settings = EvaluateSettings(dataset=dataset)
    message = r"holds images in folders \(daisy, iris, rose and 1 more\), but no train and val; expected most images of"
    with pytest.raises(InputError, match=message):
        load(settings, str(tmp_path))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_train": None}, "lacks x_train and holds y_train, x_test, y_test; expected x_train, .* or train_images"),
        ({"x_train": np.zeros((12, 8, 8), np.float32)}, r"x_train is float32 \[12, 8, 8\]; expected uint8"),
        ({"x_train": np.zeros((12, 8), np.uint8)}, "expected uint8"),
        ({"x_train": np.zeros((12, 7, 8), np.uint8)}, "8 x 8 or larger"),
        ({"x_test": np.zeros((4, 9, 8), np.uint8)}, "expected the same"),
        ({"x_test": np.zeros((0, 8, 8), np.uint8), "y_test": np.zeros(0, int)}, "1 test image or more"),
        ({"y_train": np.zeros(12)}, r"y_train is float64 \[12\]; expected integers"),
        ({"y_train": np.zeros(11, int)}, r"expected integers \[12\]"),
        ({"y_train": np.eye(3)[np.arange(12) % 3]}, r"float64 \[12, 3\]; expected .* of one-hot rows y.argmax"),
        ({"y_train": np.array(list("abcd" * 3))}, r"y_train is <U1 \[12\]; .* of names np.unique\(y"),
        ({"y_train": np.arange(12) % 3 + 1}, "y_train has 3 classes, from 1 to 3; expected class indices from 0"),
        ({"y_train": np.arange(12) % 2 * 4 + 3}, r"y_train has 2 classes, from 3 to 7; .* as np.unique\(y"),
        *(({"x_train": np.zeros(shape, np.uint8)}, r"x_train has shape \[12, .*, which looks like \[N,channels,H,W\]; "
           r"expected \[N,H,W\] or .N,H,W,channels., as x.transpose\(0, 2, 3, 1\) has it")
          for shape in ((12, 3, 16, 16), (12, 1, 8, 8), (12, 13, 64, 64), (12, 64, 13, 13), (12, 13, 24, 32))),
        ({"x_train": np.zeros((12, 28, 28, 28), np.uint8)}, r"like volumes .N,D,H,W.; .* as a slice x.:, 14. has"),
        ({"x_train": np.zeros((32, 32, 3, 12), np.uint8)}, "like .H,W,channels,N.; .* as x.transpose.3, 0, 1, 2. has"),
        ({"y_train": np.full(12, -1)}, "class indices from 0"),
        ({"y_train": np.zeros(12, int)}, "expected 2 or more classes"),
        ({"y_test": np.full(4, 7)}, "y_test to 7"),
        ({"y_train": np.full(12, 10**9)}, "y_train has 1 classes, from 1000000000 to 1000000000; expected"),
        ({"y_train": np.array([None] * 12, object)}, "cannot read"),
    ],
)
def test_wrong_npz_files_get_a_message_that_names_the_array(tmp_path, change, message):
    arrays = {"x_train": np.zeros((12, 8, 8), np.uint8), "y_train": np.arange(12) % 3}
    arrays |= {"x_test": np.zeros((4, 8, 8), np.uint8), "y_test": np.arange(4) % 3} | change
    np.savez(tmp_path / "own.npz", **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(InputError, match=message):
        load(SearchSettings(dataset="shapes"), str(tmp_path / "own.npz"))


def test_other_names_of_arrays_and_shapes_of_labels_are_read(tmp_path):
    arrays, (x, y, x_test, y_test) = own_arrays(), own_arrays().values()
    medmnist = {"train_images": x, "train_labels": y[:, None], "val_images": x, "val_labels": y[:, None]}
    medmnist |= {"test_images": x_test, "test_labels": y_test[:, None]}
    for others in {key.upper(): value for key, value in arrays.items()}, arrays | {"y_test": y_test[None]}, medmnist:
        for name, content in ("own.npz", arrays), ("other.npz", others):
            np.savez(tmp_path / name, **content)
        own, other = (load(SearchSettings(dataset="shapes"), str(tmp_path / name)) for name in ("own.npz", "other.npz"))
        assert other.fingerprint() == own.fingerprint() and own.note == ""
        assert other.note == ("val_images, val_labels in it not read" if others is medmnist else "")


def test_many_channels_are_read_where_they_come_last():
    for shape in (11, 11, 30), (13, 9, 4), (9, 13, 4), (16, 32, 3):
        assert own_images(shape).size == (shape[2], *shape[:2])


def test_an_npz_takes_little_more_memory_than_its_arrays_however_small_the_file(tmp_path, monkeypatch):
    x, path = np.zeros((2000, 64, 64, 3), np.uint8), tmp_path / "own.npz"
    x += (np.arange(2000) % 250).astype(np.uint8)[:, None, None, None]
    y = np.arange(2000) % 10
    np.savez_compressed(path, x_train=x, y_train=y, x_test=x[:500], y_test=y[:500])
    unpacked = 2500 * 64 * 64 * 3
    assert unpacked > 300 * path.stat().st_size
    tracemalloc.start()
    own = load(SearchSettings(dataset="shapes"), str(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.3 * unpacked
    assert torch.equal(own.y_train, (own.x_train[:, 1, 2, 3] % 10).long())
    assert own.x_train.float().std((1, 2, 3)).max() == 0
    monkeypatch.setattr(files, "free_memory", lambda: unpacked)
    with pytest.raises(InputError, match=f"it unpacks to 307.* bytes, and {unpacked} are free in memory"):
        load(SearchSettings(dataset="shapes"), str(path))


@pytest.mark.parametrize("groups, folder, names", [
    ("0::/job", "job", ("max", "current")),
    ("0::/elsewhere", "", ("max", "current")),  # as a container may see it
    ("4:cpu:/\n3:memory:/job\n0::/", "memory/job", ("limit_in_bytes", "usage_in_bytes")),
])  # fmt: skip
def test_the_free_memory_is_what_the_limit_of_a_container_leaves(tmp_path, groups, folder, names):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name, content in zip((*names, "stat"), ("1000", "700", "anon 300\ninactive_file 150\nactive_file 50")):
        (tmp_path / folder / f"memory.{name}").write_text(content)
    assert files.free_in_groups(groups, tmp_path) == 500
    (tmp_path / folder / f"memory.{names[0]}").write_text("max")
    assert files.free_in_groups(groups, tmp_path) == sys.maxsize


def test_arrays_of_the_caller_stay_as_they_are():
    x, y = own_arrays()["x_train"], own_arrays()["y_train"]
    Images.from_arrays(x, y, x, y)
    assert np.array_equal(x, own_arrays()["x_train"])


def test_a_damaged_npz_is_refused(tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, x_train=np.zeros((12, 8, 8), np.uint8))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot read"):
        load(SearchSettings(dataset="shapes"), str(path))


def test_shapes_are_seeded_balanced_and_beyond_a_linear_classifier():
    few, again, other = shapes(30, 20), shapes(30, 20), shapes(30, 20, seed=1)
    assert torch.equal(few.x_train, again.x_train) and torch.equal(few.y_test, again.y_test)
    assert not torch.equal(few.x_test, other.x_test)
    data = shapes(1500, 500)
    assert data.x_train.shape == (1500, 3, 32, 32) and data.num_classes == 10
    assert torch.bincount(torch.cat([data.y_train, data.y_test])).tolist() == [200] * 10
    normalise = data.evaluate_data(EvaluateConfig()).train.normalise
    x, x_test = (normalise(images).flatten(1) for images in (data.x_train, data.x_test))
    accuracies, products, right = [], x @ x.T, F.one_hot(data.y_train, 10).float()
    for ridge in 1e2, 1e3, 1e4, 1e5:
        solution = x.T @ torch.linalg.solve(products + ridge * torch.eye(len(x)), right)
        accuracies.append(((x_test @ solution).argmax(1) == data.y_test).float().mean().item())
    assert 0.1 < max(accuracies) < 0.6


# --- what searches and evaluations are given --------------------------------------------------------------------------


def test_a_search_learns_weights_from_the_first_half_and_alphas_from_the_second():
    own = own_images((8, 9, 3), classes=5, n=41)
    data = own.search_data(SearchConfig())
    assert torch.equal(torch.cat([data.train.x, data.val.x]), own.x_train) and len(data.train.x) == 20
    assert torch.equal(torch.cat([data.train.y, data.val.y]), own.y_train)
    assert (data.num_classes, data.in_channels) == (5, 3)
    whole = own.evaluate_data(EvaluateConfig())
    assert torch.equal(whole.train.x, own.x_train) and whole.val is None
    for loader in data.train, data.val, whole.train:  # normalised alike
        assert torch.equal(loader.mean.flatten(), own.mean) and torch.equal(loader.std.flatten(), own.std)


def labelled(y):
    images = own_images((8, 8), classes=int(y.max()) + 1, n=len(y))
    return dataclasses.replace(images, y_train=y)


@pytest.mark.parametrize(
    "y, message",
    [
        (torch.arange(40) // 20, "class 0 has 20 images in the first half of y_train and 0 in the second"),
        (torch.arange(39, -1, -1) // 20, "class 0 has 0 .* and 20"),
        (torch.arange(300) // 100, "class 0 has 100 .* and 0"),  # the halves share class 1
        (torch.arange(10) // 4, "class 0 has 4 .* and 0"),
        ((torch.arange(27) // 9 + 2) % 3, "class 1 has 0 .* and 9"),  # one after the other in another order
        (torch.arange(40) % 2 + torch.arange(40) // 20 * 2, "class 0 has 10 .* and 0"),  # nothing in common
        (torch.cat([torch.tensor([1, 0, 2]), torch.arange(900) // 300]), "class 0 has 301 .* and 0"),  # but for a few
    ],
)
def test_sorted_images_are_refused(y, message):
    with pytest.raises(InputError, match=f"own data: {message}.*; expected them shuffled, not sorted"):
        labelled(y).search_data(SearchConfig())


def test_shuffled_images_are_not_refused():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        n, classes = int(rng.integers(40, 4000)), int(rng.integers(2, 6))
        y = torch.from_numpy(rng.integers(0, classes, n) ** rng.integers(1, 3))  # also with classes of no images
        labelled(y).search_data(SearchConfig())


def test_test_images_are_normalised_limited_and_shared_out():
    own = own_images((8, 9, 3), classes=5, n=41)
    whole = list(own.test(batch=16))
    assert [len(y) for _, y in whole] == [16, 16, 9] and whole[0][0].dtype == torch.float32
    x, y = (torch.cat(parts) for parts in zip(*whole))
    assert torch.allclose(x * own.std.view(-1, 1, 1) + own.mean.view(-1, 1, 1), own.x_test / 255, atol=1e-6)
    assert torch.equal(y, own.y_test)
    for limit, total in (None, 41), (7, 7), (100, 41):
        parts = [list(own.test(limit, (rank, 3), batch=4)) for rank in range(3)]
        for rank, part in enumerate(parts):
            assert torch.equal(torch.cat([images for images, _ in part]), x[:total][rank::3])
            assert torch.equal(torch.cat([labels for _, labels in part]), y[:total][rank::3])
    assert list(own.test(1, (1, 2))) == []


def test_a_part_of_the_training_images_can_be_taken():
    own = own_images((8, 8), n=12)
    assert torch.equal(own.first(5).x_train, own.x_train[:5]) and torch.equal(own.first(5).y_train, own.y_train[:5])
    assert len(own.first(0).y_train) == len(own.first(99).y_train) == len(own.first(5).y_test) == 12
    with pytest.raises(InputError, match="images is 3; expected at least 4, or 0 for all"):
        own.first(3)


def test_fingerprints_tell_images_and_labels_apart():
    own = own_images((8, 8))
    assert own.fingerprint() == own_images((8, 8)).fingerprint()
    others = [dataclasses.replace(own, y_test=own.y_test.flip(0)), dataclasses.replace(own, x_train=255 - own.x_train)]
    assert len({images.fingerprint() for images in (own, own.first(5), *others)}) == 4


# --- damaged, hostile and random input --------------------------------------------------------------------------------


def own_arrays():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (12, 8, 9, 2), np.uint8), np.arange(12) % 3
    return {"x_train": x, "y_train": y, "x_test": x[:5], "y_test": y[:5]}


def npz(parts, compression=zipfile.ZIP_STORED) -> bytes:
    """An .npz of arrays, or of bytes in their place."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, part in parts.items():
            if not isinstance(part, bytes):
                array, part = part, io.BytesIO()
                np.save(part, array)
                part = part.getvalue()
            archive.writestr(f"{name}.npy", part)
    return file.getvalue()


def npy(descr, shape, data=b"", version=1) -> bytes:
    """An array file that claims what it likes; descr and shape are Python text."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(header)) + header + data


def hostile_arrays(path):
    """Array files that are not what they claim."""
    pickled, data = pickle.dumps(np.array([Exploit(path)] * 12, object)), bytes(12 * 8 * 9 * 2)
    yield from (pickled, b"", b"\x93NUMPY", npy("'|O'", "(12,)", pickled), npy("[('a', '|O')]", "(12,)", pickled))
    large = "(10**12,)", f"({10**12}, 8, 8)", f"({2**62}, 2, 2)", f"({10**30},)"
    for shape in *large, "(-12, 8, 9)", "(12, -8, -9, 2)":
        yield from (npy("'|u1'", shape, data), npy("'<i8'", shape, data), npy("'|V0'", shape), npy("'|S0'", shape))
    for descr in ("'|V2147483647'", "('|u1', (99999, 9999))", "'<U99999999'", "'<m8[s]'", "'<M8[s]'", "'<c8'", "'|b1'"):
        yield from (npy(descr, "(12,)", data), npy(descr, "()", data), npy(descr, "(12, 8, 9, 2)", data))
    long = "(" * 500, "-" * 9000 + "1", "[" * 90 + "]" * 90, "1" * 9000
    for text in *long, "__import__('os')", "'\\d'", "12L", "0x":
        yield from (npy(text, "(12,)", data), npy("'|u1'", text, data), npy("'|u1'", f"({text},)", data, version=2))


SHAPES = ((12, 8, 9, 2), (4, 8, 8), (5, 9, 8, 1), (5, 8, 9, 2), (3, 8, 8), (1, 8, 8), (12, 8), (12,), (), (0, 8, 8),
          (9, 8, 8, 0))


def fits(x, y, x_test, y_test) -> bool:
    """Whether arrays are images and their classes."""
    for a, b in (x, y), (x_test, y_test):
        if a.dtype != np.uint8 or a.ndim not in (3, 4) or not a.size or min(a.shape[1:3]) < 8:
            return False
        if b.dtype.kind not in "iu" or b.shape != a.shape[:1] or b.min() < 0:
            return False
    same = (*x.shape[1:], 1)[:3] == (*x_test.shape[1:], 1)[:3]
    classes = len(np.unique(y))
    return bool(same and len(x) >= 4 and max(1, y_test.max()) <= y.max() == classes - 1)


def test_random_npz_files_give_the_images_in_them_or_are_refused(tmp_path, limits):
    path, arrays, taken = tmp_path / "own.npz", own_arrays(), 0

    def check(content: bytes, arrays=arrays, must=None):
        """`arrays`: what it holds; must: whether it has to be accepted, if that is known."""
        nonlocal taken
        path.write_bytes(content)
        read = accepted(load, SearchSettings(dataset="shapes"), str(path))
        assert must is None or must == (read is not None)
        assert list(tmp_path.iterdir()) == [path]  # no Exploit
        if read is not None:
            order, taken = np.random.default_rng(0).permutation(len(arrays["x_train"])), taken + 1
            for split, rows in ("train", order), ("test", slice(None)):
                x, y = arrays[f"x_{split}"][rows], arrays[f"y_{split}"][rows]
                x = x[..., None] if x.ndim == 3 else x
                assert np.array_equal(getattr(read, f"x_{split}").permute(0, 2, 3, 1).numpy(), x)
                assert np.array_equal(getattr(read, f"y_{split}").numpy(), y)

    for name in arrays:
        check(npz({key: array for key, array in arrays.items() if key != name}), must=False)
    for name in "x_train", "y_test":
        for number, content in enumerate(hostile_arrays(tmp_path / "exploited")):
            with case("hostile", name, number):
                check(npz(arrays | {name: content}), must=False)
    for bomb in npy("'|u1'", f"({2**18}, 8, 8, 2)", bytes(2**25)), bytes(2**25):
        check(npz(arrays | {"x_train": bomb}, zipfile.ZIP_DEFLATED), must=False)
    check(npy("'|u1'", f"({10**12},)"), must=False)

    files = [npz(arrays), npz(arrays, zipfile.ZIP_DEFLATED), npz(arrays | {"more": np.zeros(3)})]
    for number, rng in cases(250):
        with case(number):
            content = rng.choice(files)
            # Its table of contents lies at the end.
            cut = rng.choice((0, len(content) - 300))
            check(content[:cut] + damaged(content[cut:], rng))
    for number, rng in cases(250):
        parts = {}
        for split, shape in ("train", rng.choice(SHAPES)), ("test", rng.choice(SHAPES)):
            shape = SHAPES[number % 3] if rng.random() < 0.7 else shape
            x = np.full(shape, number % 128, rng.choice(["u1"] * 40 + ["i1", "f4", "?", ">u2"]))
            y = np.arange(len(x) if x.ndim and rng.random() < 0.9 else 7) % rng.choice((1, 2, 3, 3))
            y = y.astype(rng.choice(["i8", "u1", ">i4", "u8"] * 10 + ["f8", "?", "m8[s]", "S2", "c8"]))
            if len(y) and y.dtype.kind == "i" and rng.random() < 0.2:
                y[-1] = rng.choice((-1, 2**31 - 1, 7))
            parts |= {f"x_{split}": x, f"y_{split}": y}
        with case(number):
            check(npz(parts), parts, must=fits(*parts.values()))
    assert taken > 30
