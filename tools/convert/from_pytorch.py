"""Brings a draft that another trainer wrote into the layout that flaxdraft trains on, evaluates and exports.

SOURCE is an EAGLE-3 checkpoint of SpecForge, TorchSpec, NeMo Automodel, EAGLE or speculators, a P-EAGLE checkpoint of
SpecForge or speculators, or one of DFlash or DFlash2 (SpecForge, z-lab, speculators), Domino (SpecForge) or DSpark
(DeepSpec, SpecForge, speculators): a directory of config.json with *.safetensors, or with PyTorch's own files
(training_state.pt, pytorch_model*.bin, *.pt), read through torch.load(weights_only=True)
(`pip install -e ".[convert]"`); or one such file beside its config.json.

    python tools/convert/from_pytorch.py outputs/epoch_9 drafts/mine
    python -m flaxdraft.train --config run.yaml draft.init_from=drafts/mine

Every tensor is listed: what it became, or why it was left out; a name that nothing is known of is an error. What a file
cannot tell and would be a silent mistake (offsets or ids in d2t, which state norm_output feeds back) is asked for.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flaxdraft.errors import InputError
from flaxdraft.run.commands import Command, call

TORCH_FILES = ("training_state.pt", "pytorch_model*.bin", "*.pt", "*.pth")
STATE = "draft_state_dict"  # of SpecForge's training_state.pt
TABLES = ("d2t", "t2d")
MASK = "mask_embedding.pt"


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a checkpoint: a directory, or one file beside its config.json")
    parser.add_argument("out", type=Path, help="the directory to write")
    parser.add_argument("--config", type=Path, help="config.json, where it lies elsewhere")
    parser.add_argument("--trainer", choices=("specforge", "torchspec", "nemo", "eagle", "speculators"),
                        help="who wrote it, where the files do not tell")  # fmt: skip
    parser.add_argument("--d2t", choices=("offsets", "ids"), help="what d2t holds, where the files do not tell")
    parser.add_argument("--recurrence", choices=("pre-norm", "post-norm"),
                        help="the state that the next draft step reads, where norm_output leaves it open")  # fmt: skip
    parser.add_argument("--rope-theta", type=float, help="the base that it was trained with, if config.json is wrong")


def main(argv: list[str] | None = None) -> int:
    """0 when the draft is written; 2 with one message for wrong input."""
    return call(Command(__doc__ or "", _arguments, _work), argv)


def _work(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from flaxdraft.algorithms.importing import converter
    from flaxdraft.serving.foreign.report import Options
    from flaxdraft.serving.view import read_config

    if arguments.out.resolve() == arguments.source.resolve():
        raise InputError(f"{arguments.out}: is the source itself; choose another name")
    folder = arguments.source if arguments.source.is_dir() else arguments.source.parent
    config = read_config(arguments.config or folder / "config.json")
    tensors, has_training_state = read_tensors(arguments.source)
    options = Options(arguments.trainer, arguments.d2t, arguments.recurrence, arguments.rope_theta)
    report = converter(config)(
        tensors, config, arguments.out, str(arguments.source), options, has_training_state=has_training_state
    )
    for row in report.rows:
        print(f"  {row.key}  {f'-> {row.became}' if row.became else 'left out'}{f' ({row.reason})' * bool(row.reason)}")
    for remark in report.remarks:
        print(f"note: {remark}")
    print(f"{arguments.out}: a draft of {report.trainer or 'an unknown trainer'}")


def read_tensors(source: Path) -> tuple[dict[str, np.ndarray], bool]:
    """The checkpoint's tensors, d2t and t2d from their own files among them; whether SpecForge's training state lies
    there.

    Raises:
        InputError: nothing to read, or it cannot be read.
    """
    from flaxdraft.files.safetensors_file import load_safetensors

    if not source.exists():
        raise InputError(f"{source}: no such file or directory")
    folder = source if source.is_dir() else source.parent
    if (folder / MASK).exists():
        raise InputError(
            f"{folder / MASK}: an embedding of its own for the mask token, which vLLM puts in place of the target's; "
            "drafts here have none"
        )
    tensors, has_training_state = {}, (folder / "training_state.pt").exists()
    for path in weight_files(source):
        found = load_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
        for key, array in found.items():
            if key in tensors:
                raise InputError(f"{path}: {key} is in another file too; remove one of them")
            tensors[key] = array
    for key, array in vocabulary_files(folder):
        tensors.setdefault(key, array)
    return tensors, has_training_state


def weight_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    for pattern in ("*.safetensors", *TORCH_FILES):
        if found := [path for path in sorted(source.glob(pattern)) if path.name != "vocab_mapping.pt"]:
            return found
    raise InputError(f"{source}: neither *.safetensors nor {', '.join(TORCH_FILES)}; expected a trainer's checkpoint")


def vocabulary_files(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """SpecForge keeps the tables in vocab_mapping.pt, speculators in d2t.npy and t2d.npy."""
    if (folder / "vocab_mapping.pt").exists():
        yield from read_torch(folder / "vocab_mapping.pt").items()
    for name in TABLES:
        if (folder / f"{name}.npy").exists():
            yield name, np.load(folder / f"{name}.npy", allow_pickle=False)


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a file that torch.save wrote, never unpickling anything else.

    Raises:
        InputError: PyTorch is not installed, or the file holds more than tensors and plain values.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]  # of the extra `convert` alone
    except ImportError as error:
        raise InputError(f'{path}: reading it takes PyTorch; pip install -e ".[convert]"') from error
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch's own errors
        raise InputError(f"{path}: cannot be read as weights alone ({str(error).splitlines()[0][:200]})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, expected tensors by name")
    value = value.get(STATE) or value.get("state_dict") or value.get("module") or value
    return {key: numpy_of(tensor) for key, tensor in value.items() if isinstance(tensor, torch.Tensor)}


def numpy_of(tensor) -> np.ndarray:
    """numpy knows bfloat16 through ml_dtypes alone."""
    import ml_dtypes
    import torch  # pyright: ignore[reportMissingImports]  # of the extra `convert` alone

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


if __name__ == "__main__":
    sys.exit(main())
