"""The FID network is the published one: its tensors and maps, its preprocessing, its file and its download."""

from __future__ import annotations

import hashlib
import io
import socket
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deme_diffusion.config import ExtractorSettings
from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.extractors import load_extractor
from deme_diffusion.evaluation.extractors.inception import UNUSED, Inception
from deme_diffusion.evaluation.extractors.inception_net import BlockE, average
from deme_diffusion.pipeline import extractors
from deme_diffusion.weights import State


def noise(n: int, side: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


# the FID network: architecture

BLOCKS = {  # channels out, and the side of its map for images of 299 pixels (Szegedy et al. 2016, Table 1)
    "Conv2d_1a_3x3": (32, 149), "Conv2d_2a_3x3": (32, 147), "Conv2d_2b_3x3": (64, 147), "Conv2d_3b_1x1": (80, 73),
    "Conv2d_4a_3x3": (192, 71), "Mixed_5b": (256, 35), "Mixed_5c": (288, 35), "Mixed_5d": (288, 35),
    "Mixed_6a": (768, 17), "Mixed_6b": (768, 17), "Mixed_6c": (768, 17), "Mixed_6d": (768, 17), "Mixed_6e": (768, 17),
    "Mixed_7a": (1280, 8), "Mixed_7b": (2048, 8), "Mixed_7c": (2048, 8),
}  # fmt: skip
KERNELS = {  # (out, in, height, width), as they stand in the published state dict
    "Conv2d_1a_3x3": (32, 3, 3, 3), "Conv2d_2a_3x3": (32, 32, 3, 3), "Conv2d_2b_3x3": (64, 32, 3, 3),
    "Conv2d_3b_1x1": (80, 64, 1, 1), "Conv2d_4a_3x3": (192, 80, 3, 3),
    **{f"Mixed_{block}.{branch}": shape for block, channels, pooled in (("5b", 192, 32), ("5c", 256, 64),
       ("5d", 288, 64)) for branch, shape in {
        "branch1x1": (64, channels, 1, 1), "branch5x5_1": (48, channels, 1, 1), "branch5x5_2": (64, 48, 5, 5),
        "branch3x3dbl_1": (64, channels, 1, 1), "branch3x3dbl_2": (96, 64, 3, 3), "branch3x3dbl_3": (96, 96, 3, 3),
        "branch_pool": (pooled, channels, 1, 1)}.items()},
    "Mixed_6a.branch3x3": (384, 288, 3, 3), "Mixed_6a.branch3x3dbl_1": (64, 288, 1, 1),
    "Mixed_6a.branch3x3dbl_2": (96, 64, 3, 3), "Mixed_6a.branch3x3dbl_3": (96, 96, 3, 3),
    **{f"Mixed_{block}.{branch}": shape for block, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192))
       for branch, shape in {
        "branch1x1": (192, 768, 1, 1), "branch7x7_1": (c, 768, 1, 1), "branch7x7_2": (c, c, 1, 7),
        "branch7x7_3": (192, c, 7, 1), "branch7x7dbl_1": (c, 768, 1, 1), "branch7x7dbl_2": (c, c, 7, 1),
        "branch7x7dbl_3": (c, c, 1, 7), "branch7x7dbl_4": (c, c, 7, 1), "branch7x7dbl_5": (192, c, 1, 7),
        "branch_pool": (192, 768, 1, 1)}.items()},
    "Mixed_7a.branch3x3_1": (192, 768, 1, 1), "Mixed_7a.branch3x3_2": (320, 192, 3, 3),
    "Mixed_7a.branch7x7x3_1": (192, 768, 1, 1), "Mixed_7a.branch7x7x3_2": (192, 192, 1, 7),
    "Mixed_7a.branch7x7x3_3": (192, 192, 7, 1), "Mixed_7a.branch7x7x3_4": (192, 192, 3, 3),
    **{f"Mixed_{block}.{branch}": shape for block, channels in (("7b", 1280), ("7c", 2048)) for branch, shape in {
        "branch1x1": (320, channels, 1, 1), "branch3x3_1": (384, channels, 1, 1), "branch3x3_2a": (384, 384, 1, 3),
        "branch3x3_2b": (384, 384, 3, 1), "branch3x3dbl_1": (448, channels, 1, 1), "branch3x3dbl_2": (384, 448, 3, 3),
        "branch3x3dbl_3a": (384, 384, 1, 3), "branch3x3dbl_3b": (384, 384, 3, 1),
        "branch_pool": (192, channels, 1, 1)}.items()},
}  # fmt: skip


def published_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, kernel in KERNELS.items():
        shapes[f"{name}.conv.weight"] = kernel
        shapes |= {f"{name}.bn.{part}": kernel[:1] for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def light_state(**changes: tuple[int, ...] | None) -> State:
    """A whole state that takes no space: each tensor is one number, expanded to its shape."""
    shapes = {**published_shapes(), **{k.replace("__", "."): v for k, v in changes.items()}}
    state = {}
    for i, (key, shape) in enumerate(sorted((k, s) for k, s in shapes.items() if s is not None)):
        # Spread around 1 in a variance, small elsewhere: the forward pass stays finite.
        value = 1.0 + i / 1000 if "running_var" in key else (i % 7 - 3) / 1000
        state[key] = torch.tensor(value).expand(shape)
    return state


@pytest.fixture(scope="module")
def random_net() -> Inception:
    torch.manual_seed(0)
    return Inception().eval().requires_grad_(False)


def test_fid_network_has_the_published_tensors(random_net: Inception) -> None:
    state = {k: tuple(v.shape) for k, v in random_net.net.state_dict().items() if not k.endswith(UNUSED)}
    assert state == published_shapes()
    assert len(KERNELS) == 94
    # 23,834,568 parameters are published for Inception-v3 of 1,000 classes without its auxiliary head; eight more here.
    assert sum(p.numel() for p in random_net.net.parameters()) == 23_834_568 + 8 * (2048 + 1)
    assert all(module.eps == 0.001 for module in random_net.modules() if isinstance(module, nn.BatchNorm2d))


def test_every_block_has_the_published_map_and_features_are_the_mean_of_the_last(random_net: Inception) -> None:
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, out))
        for name, block in random_net.net.named_children()
    ]
    features, logits = random_net(noise(1, 8))
    for hook in hooks:
        hook.remove()
    assert {name: (out.shape[1], out.shape[2], out.shape[3]) for name, out in seen.items()} == {
        name: (channels, side, side) for name, (channels, side) in BLOCKS.items()
    }
    torch.testing.assert_close(features[0], seen["Mixed_7c"][0].mean((1, 2)))
    assert (tuple(features.shape), tuple(logits.shape)) == ((1, 2048), (1, 1008))
    assert features.std() > 0


def test_average_pooling_leaves_the_padding_out() -> None:
    x = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)  # 1 2 3 / 4 5 6 / 7 8 9
    corners_and_middle = average(x)[0, 0, [0, 0, 1, 2], [0, 1, 1, 2]]
    assert corners_and_middle.tolist() == [(1 + 2 + 4 + 5) / 4, (1 + 2 + 3 + 4 + 5 + 6) / 6, 5.0, (5 + 6 + 8 + 9) / 4]


def test_last_block_pools_by_maximum_and_the_one_before_by_mean(random_net: Inception) -> None:
    assert not random_net.net.Mixed_7b.maximum
    assert random_net.net.Mixed_7c.maximum
    torch.manual_seed(0)
    x = torch.rand(1, 6, 5, 5)
    for maximum in (False, True):
        block = BlockE(6, maximum=maximum).eval()
        pooled = nn.functional.max_pool2d(x, 3, 1, 1) if maximum else average(x)
        torch.testing.assert_close(block(x)[:, -192:], block.branch_pool(pooled))


def test_inception_score_logits_have_no_bias(random_net: Inception) -> None:
    with torch.no_grad():
        random_net.net.fc.bias.fill_(1e6)
    features, logits = random_net(noise(1, 8))
    torch.testing.assert_close(logits, features @ random_net.net.fc.weight.T, rtol=1e-4, atol=1e-4)
    assert logits.abs().max() < 1e5


# the FID network: preprocessing


def test_enlarging_is_linear_between_pixel_centres() -> None:
    image = np.array([[[[0], [255]], [[0], [255]]]], dtype=np.uint8)  # a black and a white column
    row = Inception.inputs(None, image)[0, 0, 150]  # type: ignore[arg-type]
    # Pixel i lies at (i + 1/2) 2 / 299 - 1/2 between the centres 0 and 1, and beyond them the border is repeated.
    at = [min(max((i + 0.5) * 2 / 299 - 0.5, 0.0), 1.0) for i in range(299)]
    assert row.tolist() == pytest.approx([2 * x - 1 for x in at], abs=1e-5)
    assert (row[0], row[298]) == (-1.0, 1.0)
    assert row[149] == pytest.approx(0.0, abs=1e-6)


def test_shrinking_takes_the_two_nearest_pixels_without_antialiasing() -> None:
    stripes = np.zeros((1, 299 * 4, 299 * 4, 1), dtype=np.uint8)
    stripes[:, :, 1::4] = 255
    stripes[:, :, 2::4] = 255  # centre 4 i + 3/2 lies between these two; an antialiased mean would be grey
    assert torch.equal(
        Inception.inputs(None, stripes),  # type: ignore[arg-type]
        torch.ones(1, 3, 299, 299),
    )


def test_images_of_299_pixels_are_only_scaled_and_grey_is_repeated(random_net: Inception) -> None:
    image = noise(1, 299)
    expected = torch.from_numpy(image).permute(0, 3, 1, 2) / 255 * 2 - 1
    torch.testing.assert_close(random_net.inputs(image), expected, rtol=0, atol=1e-6)
    grey = image[..., :1]
    torch.testing.assert_close(random_net.inputs(grey), random_net.inputs(np.repeat(grey, 3, axis=3)))
    assert random_net.preprocessing.startswith("bilinear-299: ")


# the FID network: its file


def test_weights_come_from_pth_and_safetensors_alike(tmp_path: Path) -> None:
    state = light_state()
    torch.save(state, tmp_path / "a.pth")
    counted = {k.replace("running_var", UNUSED): torch.tensor(7) for k in state if "running_var" in k}
    save_file({k: v.contiguous() for k, v in (state | counted).items()}, tmp_path / "a.safetensors")
    loaded = [load_extractor(tmp_path / name, "inception") for name in ("a.pth", "a.safetensors")]
    for extractor in loaded:
        assert isinstance(extractor, Inception)
        assert not extractor.training
        for key, tensor in extractor.net.state_dict().items():
            assert key.endswith(UNUSED) or torch.equal(tensor, state[key]), key
    assert loaded[0].dimension == 2048


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: light_state(fc__weight=(1000, 2048), fc__bias=(1000,)), "1000 classes, as torchvision"),
        (lambda: light_state(Mixed_7c__branch_pool__conv__weight=None), "1 of 472 .*Mixed_7c.branch_pool.conv.weight"),
        (lambda: light_state(AuxLogits__fc__weight=(3, 2)), "1 tensors are not of this network, as AuxLogits.fc"),
        (lambda: light_state(fc__bias=(5,)), r"fc.bias has shape \(5,\), where \(1008,\) is expected"),
        (lambda: {"weight": torch.ones(2)}, "472 of 472 tensors are missing"),
        (lambda: {"epoch": 3}, "no state dict"),
        (lambda: [torch.ones(2)], "no state dict"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path: Path, state: Callable[[], Any], message: str) -> None:
    torch.save(state(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=message) as told:
        load_extractor(tmp_path / "a.pth", "inception")
    assert "\n" not in str(told.value)


def test_programs_pickles_and_rubbish_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "inception-2015-12-05.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), script)
    with pytest.raises(UserError, match=r"a TorchScript program .* which is never run"):
        load_extractor(script, "inception")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    (tmp_path / "rubbish.pth").write_bytes(b"x" * 100)
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"a": torch.zeros(9)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:300])
    (tmp_path / "struct.pth").write_bytes(b"\x80\x02K")
    torn = "it is no whole file of torch.save; fetch it again"
    objects = "it holds Python objects beside tensors, which are never unpickled; take the published file"
    said = dict.fromkeys(("rubbish", "empty", "cut", "struct"), torn) | {"module": objects}
    for name, reason in said.items():
        with pytest.raises(UserError) as told:
            load_extractor(tmp_path / f"{name}.pth", "inception")
        assert str(told.value) == f"{tmp_path / name}.pth: no readable state dict ({reason})"
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_extractor(tmp_path / "cut.safetensors", "inception")


# the FID network: its download

INCEPTION = ExtractorSettings(kind="inception")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"


def serve(content: bytes, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr(extractors.urllib.request, "urlopen", urlopen)
    return asked


def weights_file() -> bytes:
    buffer = io.BytesIO()
    torch.save(light_state(), buffer)
    return buffer.getvalue()


def test_dry_run_names_the_download_and_touches_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)
    found = extractors.given(INCEPTION, download=False)
    assert found is not None
    assert (found.path, found.label) == (None, extractors.URL)


def test_download_is_checked_kept_and_known_by_its_checksum(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = weights_file()
    monkeypatch.setattr(extractors, "SHA256", hashlib.sha256(content).hexdigest()[:8])
    before = extractors.given(INCEPTION, download=False)
    asked = serve(content, monkeypatch)
    found = [extractors.given(INCEPTION, download=True) for _ in range(2)]
    assert asked == [extractors.URL]
    assert cache.read_bytes() == content
    assert list(cache.parent.iterdir()) == [cache]
    given = INCEPTION.model_copy(update={"pretrained": str(cache)})
    assert {f.digest for f in (before, *found, extractors.given(given, download=True)) if f} == {found[0].digest}  # type: ignore[union-attr]


def test_download_of_something_else_leaves_no_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(b"<html>sign in</html>", monkeypatch)
    with pytest.raises(UserError, match=r"came with sha256 \w{8}..., not 6726825d"):
        extractors.given(INCEPTION, download=True)
    assert not list(cache.parent.iterdir())
    cache.write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"is not the published file .*; remove it"):
        extractors.given(INCEPTION, download=False)


def test_offline_says_what_to_download_and_where_to_put_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, timeout: float) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(extractors.urllib.request, "urlopen", refuse)
    with pytest.raises(UserError) as told:
        extractors.given(INCEPTION, download=True)
    message = str(told.value)
    assert extractors.URL in message and str(cache) in message and "no route to host" in message
    assert "\n" not in message


def test_local_inception_file_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(content := weights_file())
    (tmp_path / "b.pth").write_bytes(content)
    torch.save(light_state() | {"fc.bias": torch.ones(1008)}, tmp_path / "c.pth")
    settings = [ExtractorSettings(kind="inception", pretrained=str(tmp_path / f"{name}.pth")) for name in "abc"]
    a, b, c = (extractors.given(s, download=True) for s in settings)
    assert a and b and c
    assert a.digest == b.digest != c.digest
    with pytest.raises(UserError, match=r"none\.pth is no file; kind inception takes pt_inception"):
        extractors.given(ExtractorSettings(kind="inception", pretrained=str(tmp_path / "none.pth")), download=False)
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "tv.pth")
    with pytest.raises(UserError, match="torchvision"):  # before anything is trained
        extractors.given(ExtractorSettings(kind="inception", pretrained=str(tmp_path / "tv.pth")), download=True)
