"""Images and text that zoos are trained on: local copies, downloads, and what goes wrong."""

import gzip
import hashlib
import io
import socket
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets_zoo import download
from datasets_zoo import images as module
from datasets_zoo import text as text_module
from datasets_zoo.download import Remote, fetch
from datasets_zoo.images import REMOTES, images, standardised
from datasets_zoo.text import Tokenizer, text
from wspace.errors import ZooError


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and no data set of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(download.VARIABLE, raising=False)


def cached(tmp_path: Path) -> list[Path]:
    return [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def remote(path: Path, kind: str = "sha256") -> Remote:
    return Remote(path.as_uri(), f"{kind}:{hashlib.new(kind, path.read_bytes()).hexdigest()}")


def random_bytes(*shape: int, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(high, size=shape).astype(np.uint8)


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.tobytes()


def ubyte_files(folder: Path, *, packed: bool = True) -> dict[str, np.ndarray]:
    """MNIST's four files with a few images; what they hold."""
    arrays = {
        "train-images-idx3-ubyte": random_bytes(5, 28, 28),
        "train-labels-idx1-ubyte": random_bytes(5, high=10),
        "t10k-images-idx3-ubyte": random_bytes(3, 28, 28),
        "t10k-labels-idx1-ubyte": random_bytes(3, high=10),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays


def cifar_tar(path: Path, *, names: tuple[str, ...] = module._BINS) -> dict[str, np.ndarray]:
    """An archive like CIFAR-10's with two images in each file; records by name of the file."""
    records = {name: random_bytes(2, 3073) for name in names}
    with tarfile.open(path, "w:gz") as tar:
        for name, record in records.items():
            item = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            item.size = record.size
            tar.addfile(item, io.BytesIO(record.tobytes()))
    return records


# --- fetching -------------------------------------------------------------------------------------


def test_a_file_is_fetched_once(tmp_path: Path) -> None:
    source = tmp_path / "words.txt"
    source.write_text("words")
    item = remote(source)
    path = fetch(item, "some")
    assert path == tmp_path / "cache" / "wspace" / "some" / "words.txt"
    source.unlink()
    assert fetch(item, "some").read_text() == "words"
    assert cached(tmp_path) == [path]


def test_a_damaged_copy_is_fetched_again(tmp_path: Path) -> None:
    source = tmp_path / "words.txt"
    source.write_text("words")
    path = fetch(remote(source), "some")
    path.write_text("wor")
    assert fetch(remote(source), "some").read_text() == "words"


def test_a_wrong_checksum_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "words.txt"
    source.write_text("other")
    with pytest.raises(ZooError, match=r"(?s)not the file it should be.*expected md5:00.*5 bytes"):
        fetch(Remote(source.as_uri(), "md5:00"), "some")
    assert cached(tmp_path) == []


def test_no_network_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = (Remote((tmp_path / "gone.tar.gz").as_uri(), "md5:00"),)
    monkeypatch.setitem(REMOTES, "cifar10", gone)
    with pytest.raises(ZooError, match=r"(?s)could not fetch.*WSPACE_DATA.*cifar10.npz"):
        images("cifar10")
    assert cached(tmp_path) == []


@pytest.mark.parametrize("answer", ["whole", "cut", "missing", "garbage"])
def test_a_server(tmp_path: Path, answer: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        reply = {
            "whole": b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nwords",
            "cut": b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nwor",
            "missing": b"HTTP/1.0 404 Not Found\r\n\r\n",
            "garbage": b"nothing\r\n\r\n",
        }[answer]

        def serve() -> None:
            with server.accept()[0] as client:
                client.recv(4096)
                client.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/words.txt"
        item = Remote(url, f"sha256:{hashlib.sha256(b'words').hexdigest()}")
        try:
            if answer == "whole":
                assert fetch(item, "some").read_text() == "words"
            else:
                with pytest.raises(ZooError, match=url):
                    fetch(item, "some")
        finally:
            thread.join()
    assert len(cached(tmp_path)) == (answer == "whole")


def test_published_checksums_are_whole() -> None:
    for item in [*sum(REMOTES.values(), ()), text_module.SHAKESPEARE]:
        kind, _, digits = item.checksum.partition(":")
        assert len(digits) == hashlib.new(kind).digest_size * 2
        assert item.url.startswith("https://")


# --- images ---------------------------------------------------------------------------------------


def test_digits_keep_their_split() -> None:
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    data = images("digits")
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    raw = torch.tensor(load_digits().images)[order]
    assert data.train_x.shape == (1297, 8, 8) and data.test_x.shape == (500, 8, 8)
    assert torch.equal(torch.cat([data.train_x, data.test_x]), (raw * 255 / 16).round().byte())
    assert data.train_x.dtype == torch.uint8 and data.train_y.dtype == torch.int64


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("folder", ["", "mnist", "MNIST/raw"])
def test_mnist_files(tmp_path: Path, folder: str, packed: bool) -> None:
    arrays = ubyte_files(tmp_path / folder, packed=packed)
    for part, array in zip(images("mnist", tmp_path), arrays.values(), strict=True):
        assert np.array_equal(part.numpy(), array)


def test_mnist_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = ubyte_files(tmp_path / "host")
    files = [remote(tmp_path / "host" / f"{name}.gz", "md5") for name in arrays]
    monkeypatch.setitem(REMOTES, "mnist", tuple(files))
    assert np.array_equal(images("mnist").test_x.numpy(), arrays["t10k-images-idx3-ubyte"])
    assert len(cached(tmp_path)) == 4
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv(download.VARIABLE, str(tmp_path / "empty"))
    assert len(images("mnist").train_y) == 5
    with pytest.raises(ZooError, match="mnist is not in"):
        images("mnist", tmp_path / "empty")


def test_fashion_is_not_taken_for_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = ubyte_files(tmp_path)
    files = [remote(tmp_path / f"{name}.gz", "md5") for name in arrays]
    monkeypatch.setitem(REMOTES, "fashion_mnist", tuple(files))
    assert len(images("fashion_mnist", tmp_path).train_y) == 5
    with pytest.raises(ZooError, match="belongs to fashion_mnist"):
        images("mnist", tmp_path)


@pytest.mark.parametrize("damage", ["cut", "garbage", "missing"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    ubyte_files(tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9] if damage == "cut" else gzip.compress(b"nothing"))
    with pytest.raises(ZooError, match="t10k-labels-idx1-ubyte"):
        images("mnist", tmp_path)


def test_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {
        "train_x": random_bytes(4, 6, 6, 3),
        "train_y": random_bytes(4, high=10),
        "test_x": random_bytes(2, 6, 6, 3),
        "test_y": random_bytes(2, high=10),
    }
    np.savez(tmp_path / "cifar10.npz", **arrays)
    monkeypatch.setenv(download.VARIABLE, str(tmp_path))
    for given in (None, tmp_path, tmp_path / "cifar10.npz"):
        parts = images("cifar10", given)
        assert all(np.array_equal(parts[i], a) for i, a in enumerate(arrays.values()))
    small = images("cifar10_16x16")
    means = arrays["train_x"].reshape(4, 3, 2, 3, 2, 3).astype(float).mean((2, 4))
    assert np.array_equal(small.train_x, np.floor(means + 0.5))
    np.savez(tmp_path / "mnist.npz", **{**arrays, "test_y": arrays["test_y"][:1]})
    with pytest.raises(ZooError, match=r"(?s)mnist.npz does not hold.*test_y: uint8 \(1,\)"):
        images("mnist")
    (tmp_path / "mnist.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ZooError, match=r"mnist.npz cannot be read"):
        images("mnist")


def test_standardised(tmp_path: Path) -> None:
    parts = ("train_x", "test_x", "train_y", "test_y")
    arrays = [random_bytes(9, 4, 5, 3), random_bytes(2, 4, 5, 3), random_bytes(9), random_bytes(2)]
    arrays[0][..., 2] = 7  # a channel that is constant
    np.savez(tmp_path / "cifar10.npz", **dict(zip(parts, arrays, strict=True)))
    data = standardised("cifar10", tmp_path)
    assert data.train_x.shape == (9, 3, 4, 5) and data.test_x.shape == (2, 3, 4, 5)
    deviation, mean = torch.std_mean(data.train_x, (0, 2, 3))
    assert torch.allclose(mean, torch.zeros(3), atol=1e-5)
    assert torch.allclose(deviation, torch.tensor([1.0, 1.0, 0.0]))
    raw = arrays[0].astype(float)
    expected = (arrays[1][1, 3, 0, 1] - raw[..., 1].mean()) / raw[..., 1].std(ddof=1)
    assert float(data.test_x[1, 1, 3, 0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("unpacked", [True, False])
def test_cifar_files(tmp_path: Path, unpacked: bool) -> None:
    records = cifar_tar(tmp_path / "cifar-10-binary.tar.gz")
    if unpacked:
        with tarfile.open(tmp_path / "cifar-10-binary.tar.gz") as tar:
            tar.extractall(tmp_path, filter="data")
        (tmp_path / "cifar-10-binary.tar.gz").unlink()
    data = images("cifar10", tmp_path)
    assert data.train_x.shape == (10, 32, 32, 3) and data.test_x.shape == (2, 32, 32, 3)
    record = records["test_batch.bin"][1]
    assert data.test_y[1] == record[0]
    for color in range(3):  # red, green and blue follow each other, each row by row
        assert data.test_x[1, 2, 7, color] == record[1 + color * 1024 + 2 * 32 + 7]


def test_pickled_cifar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    cifar_tar(path, names=("data_batch_1", "test_batch"))
    with pytest.raises(ZooError, match=r"(?s)not CIFAR-10's binary version.*pickled"):
        images("cifar10", path)
    path.write_bytes(b"nothing")
    with pytest.raises(ZooError, match=r"cifar-10-binary.tar.gz is damaged"):
        images("cifar10", tmp_path)


def test_unknown_images() -> None:
    with pytest.raises(ZooError, match=r"(?s)no such data set.*mnist.*got 'mnits'"):
        images("mnits")
    with pytest.raises(ZooError, match="`root` names /nowhere"):
        images("mnist", "/nowhere")


# --- text -----------------------------------------------------------------------------------------


def test_bundled_text() -> None:
    assert text("zen").startswith("The Zen of Python, by Tim Peters")
    assert len(text("python_docs")) > 100_000


def test_shakespeare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "tinyshakespeare.txt"
    source.write_text("To be, or not to be")
    assert text(root=tmp_path) == text(root=source) == "To be, or not to be"
    monkeypatch.setattr(text_module, "SHAKESPEARE", remote(source))
    assert text() == "To be, or not to be"
    (tmp_path / "tinyshakespeare.txt").write_bytes(b"\xff\xff")
    with pytest.raises(ZooError, match=r"tinyshakespeare.txt cannot be read"):
        text(root=tmp_path)
    with pytest.raises(ZooError, match="tinyshakespeare is not in"):
        text(root=tmp_path / "cache")
    with pytest.raises(ZooError, match=r"(?s)no such text.*zen"):
        text("zem")


def test_tokens() -> None:
    for tokens in (Tokenizer(), Tokenizer.of(text("zen"))):
        numbers = tokens.encode(text("zen"))
        assert tokens.decode(numbers) == text("zen")
        assert int(numbers.max()) < len(tokens)
    assert Tokenizer().encode("é").tolist() == [0xC3, 0xA9]
    with pytest.raises(ZooError, match="é"):
        Tokenizer.of("e").encode("é")
