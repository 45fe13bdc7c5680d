"""Downloads, against servers on this machine only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from make_server import Server, empty_caches, hub_at, serve

from weights.arch import Arch, resolve_arch
from weights.errors import WeightsError
from weights.fetch import download, from_url, has_source, hub_files
from weights.locate import in_caches, locate

CONTENT = b"these are weights" * 100
DIGEST = hashlib.sha256(CONTENT).hexdigest()
GOOD = f"tiny-{DIGEST[:8]}.pth"
BAD = "tiny-00000000.pth"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve(monkeypatch) as running:
        yield running


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and a hub address on which nothing listens."""
    empty_caches(tmp_path, monkeypatch)
    return tmp_path


def arch_at(url: str = "", hub: str = "") -> Arch:
    return replace(resolve_arch("resnet18"), config={"url": url, "hf_hub_id": hub})


def files_under(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def test_a_file_with_the_right_hash_arrives_in_torch_hubs_cache(server: Server, caches: Path) -> None:
    server.files[f"/{GOOD}"] = CONTENT
    path = download(arch_at(f"{server.address}/{GOOD}"))
    assert path == caches / "torch" / "hub" / "checkpoints" / GOOD
    assert path.read_bytes() == CONTENT


def test_locate_downloads_once_and_finds_the_file_in_the_cache_then(server: Server) -> None:
    server.files[f"/{GOOD}"] = CONTENT
    arch = arch_at(f"{server.address}/{GOOD}")
    first = locate(arch)
    second = locate(arch)
    assert (first.source, second.source) == ("download", f"torch hub cache, {GOOD}")
    assert first.path == second.path
    assert server.asked == [f"GET /{GOOD}"]


def test_a_file_with_the_wrong_hash_is_refused_and_nothing_stays(server: Server, caches: Path) -> None:
    server.files[f"/{BAD}"] = CONTENT
    with pytest.raises(WeightsError, match=r'does not match its hash and was thrown away: .*expected "00000000"'):
        download(arch_at(f"{server.address}/{BAD}"))
    assert files_under(caches) == []


def test_an_absent_file_is_named_with_its_status(server: Server, caches: Path) -> None:
    with pytest.raises(WeightsError, match=f"{GOOD} \\(.*Not Found.*\\)"):
        download(arch_at(f"{server.address}/{GOOD}"))
    assert files_under(caches) == []


def test_without_a_network_the_error_names_places_and_ways_on(caches: Path) -> None:
    arch = arch_at(f"http://127.0.0.1:9/{GOOD}", hub="timm/tiny")
    with pytest.raises(WeightsError) as error:
        download(arch, ["--weights-dir models"])
    text = str(error.value)
    assert text.startswith(
        "Found no weights for resnet18.tv_in1k: searched --weights-dir models, Hugging Face hub timm/tiny ("
    )
    assert f"http://127.0.0.1:9/{GOOD} (" in text
    for way in ("--weights-dir", "--weights FILE", "--weights none", "run again with a network"):
        assert way in text
    assert "\n" not in text
    assert files_under(caches) == []


def test_plain_http_is_refused_except_on_this_machine(caches: Path) -> None:
    with pytest.raises(WeightsError, match=r"refused http://example\.com/a\.pth: only https addresses are trusted"):
        from_url("http://example.com/a.pth", caches / "a.pth")
    with pytest.raises(WeightsError, match=r"refused file:///a\.pth"):
        from_url("file:///a.pth", caches / "a.pth")


def test_an_address_that_leads_to_plain_http_is_refused(server: Server, caches: Path) -> None:
    """127.0.0.2 is this machine too, and nothing listens there; but only its usual names are trusted."""
    server.moved[f"/{GOOD}"] = "http://127.0.0.2:9/a.pth?signed"
    with pytest.raises(WeightsError, match=r"refused http://127\.0\.0\.2:9, to which it leads: only https addresses"):
        from_url(f"{server.address}/{GOOD}", caches / "models" / GOOD)
    assert files_under(caches) == []
    server.moved[f"/{GOOD}"], server.files["/elsewhere"] = f"{server.address}/elsewhere", CONTENT
    assert from_url(f"{server.address}/{GOOD}", caches / "models" / GOOD).read_bytes() == CONTENT


def test_a_file_without_a_hash_is_not_fetched(server: Server, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_at(monkeypatch, server.address)
    hub = "/timm/tiny/resolve/main/model.safetensors"
    server.files |= {"/plain.pth": CONTENT, hub: CONTENT}
    server.digests[hub] = "5" * 40  # what the hub states of a file in git itself
    with pytest.raises(WeightsError) as error:
        download(arch_at(f"{server.address}/plain.pth", hub="timm/tiny"))
    assert "refused model.safetensors: the hub states no sha256 to check it with" in str(error.value)
    assert "refused plain.pth: neither its name nor its server states a sha256 to check it with" in str(error.value)
    assert server.asked == [f"HEAD {hub}"]
    assert files_under(caches) == []


def test_a_hub_at_plain_http_is_not_asked(server: Server, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`$HF_ENDPOINT` may name any address, and the hub may send to any."""
    hub_at(monkeypatch, "http://127.0.0.2:9")
    with pytest.raises(WeightsError, match=r"refused http://127\.0\.0\.2:9/timm/tiny/.*: only https addresses"):
        download(arch_at(hub="timm/tiny"))
    hub_at(monkeypatch, server.address)
    server.moved["/timm/tiny/resolve/main/model.safetensors"] = "http://127.0.0.2:9/blob"
    with pytest.raises(WeightsError, match=r"refused http://127\.0\.0\.2:9/blob: only https addresses"):
        download(arch_at(hub="timm/tiny"))
    assert files_under(caches) == []


def test_the_hub_is_asked_first_and_its_cache_used(
    server: Server, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_at(monkeypatch, server.address)
    server.files["/timm/tiny/resolve/main/pytorch_model.bin"] = CONTENT
    path = download(arch_at(f"{server.address}/{GOOD}", hub="timm/tiny"))
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(caches / "hub" / "models--timm--tiny")
    assert server.asked[0] == "HEAD /timm/tiny/resolve/main/model.safetensors"
    assert f"GET /{GOOD}" not in server.asked
    found = locate(arch_at(hub="timm/tiny"))
    assert (found.path, found.source) == (path, "Hugging Face cache, timm/tiny")


def test_a_file_of_the_hub_with_the_wrong_hash_is_refused_and_nothing_stays(
    server: Server, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client compares lengths and no hashes."""
    hub_at(monkeypatch, server.address)
    path = "/timm/tiny/resolve/main/model.safetensors"
    server.files[path], server.digests[path] = CONTENT, "0" * 64
    with pytest.raises(WeightsError, match=rf"thrown away: expected 0{{64}}, got {DIGEST}\)"):
        download(arch_at(hub="timm/tiny"))
    assert CONTENT not in [path.read_bytes() for path in caches.rglob("*") if path.is_file()]
    assert in_caches(arch_at(hub="timm/tiny")) is None


def test_after_the_hub_comes_the_address(server: Server, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_at(monkeypatch, server.address)
    server.files[f"/{GOOD}"] = CONTENT
    assert download(arch_at(f"{server.address}/{GOOD}", hub="timm/tiny")).name == GOOD


def test_a_network_without_any_source_says_so() -> None:
    arch = arch_at()
    assert not has_source(arch)
    assert not has_source(arch_at("https://example.com/vit.npz"))
    with pytest.raises(WeightsError, match=r"^There are no pretrained weights for resnet18\.tv_in1k.*--weights none"):
        download(arch)


def test_names_on_the_hub() -> None:
    own = replace(arch_at(), config={"hf_hub_filename": "open_clip_pytorch_model.bin"})
    assert hub_files(own) == ("open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
    assert hub_files(arch_at()) == ("model.safetensors", "pytorch_model.bin")
