"""The Inception network of FID: where its published weights are had from, their checks, and its preprocessing."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

from deme_diffusion.errors import UserError
from deme_diffusion.evaluation.extractors.base import Extractor, Pixels, repeated
from deme_diffusion.evaluation.extractors.inception_net import FEATURES, InceptionNet
from deme_diffusion.weights import State, load_state

SIDE, BATCH = 299, 64
UNUSED = "num_batches_tracked"


class Inception(Extractor):
    """Pool features (n, 2048) of the FID Inception network.

    The logits (n, 1008) leave out the bias of the last layer, as the reference implementations of the Inception score
    do (Salimans et al. 2016; torch-fidelity's `logits_unbiased`).
    """

    preprocessing = "bilinear-299: 8-bit, to [0, 1], bilinear to 299x299 without antialiasing, to [-1, 1]"
    dimension = FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.net = InceptionNet()

    def batch_size(self, pixels: Pixels) -> int:
        """All images are of one size to the network."""
        return BATCH

    def inputs(self, pixels: Pixels) -> torch.Tensor:
        """float32 (n, 3, 299, 299) in [-1, 1], by the operations of pytorch-fid, pixel centres aligned."""
        unit = torch.from_numpy(repeated(pixels, 3)).permute(0, 3, 1, 2).float() / 255
        return 2 * F.interpolate(unit, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1

    def outputs(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (n, 2048) and logits (n, 1008) without bias."""
        features = self.net(inputs)
        return features, F.linear(features, self.net.fc.weight)


def load_inception(file: Path) -> Inception:
    """The network with the weights of a .pth or .safetensors file. Raises UserError for weights of another network."""
    state = {key: tensor for key, tensor in _read(file).items() if not key.endswith(UNUSED)}
    with torch.device("meta"):  # a second of random numbers saved
        extractor = Inception()
    _check(file, state, extractor.net)
    counters = {key: torch.zeros((), dtype=torch.int64) for key in extractor.net.state_dict() if key.endswith(UNUSED)}
    extractor.to_empty(device="cpu")
    extractor.net.load_state_dict(state | counters)
    return extractor


def _read(file: Path) -> State:
    if file.suffix == ".safetensors":
        return load_state(file)
    try:
        if _is_torchscript(file):
            raise UserError(
                f"{file}: a TorchScript program (NVIDIA's inception-2015-12-05.pt?), which is never run; "
                "take the state dict pt_inception-2015-12-05-6726825d.pth"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickle protocols, which rubbish begins with
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UserError:
        raise
    except Exception as error:  # whatever a reader of pickles makes of bytes that are none
        raise UserError(f"{file}: no readable state dict ({_reason(error)})") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise UserError(f"{file}: no state dict, which maps names to tensors")
    return state


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        return "it holds Python objects beside tensors, which are never unpickled; take the published file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "it is no whole file of torch.save; fetch it again"


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


def _check(file: Path, state: State, net: InceptionNet) -> None:
    """Raises UserError unless keys and shapes are those of the FID network."""
    expected = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items() if not key.endswith(UNUSED)}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if found == expected:
        return
    if found.get("fc.weight", (0,))[0] == 1000:
        what = "it has 1000 classes, as torchvision's Inception-v3, where the network of FID has 1008"
    elif missing := sorted(expected.keys() - found.keys()):
        what = f"{len(missing)} of {len(expected)} tensors are missing, as {missing[0]}"
    elif extra := sorted(found.keys() - expected.keys()):
        what = f"{len(extra)} tensors are not of this network, as {extra[0]}"
    else:
        key = next(key for key in expected if expected[key] != found[key])
        what = f"{key} has shape {found[key]}, where {expected[key]} is expected"
    raise UserError(f"{file}: not the FID Inception weights: {what}")
