# SPDX-License-Identifier: Apache-2.0
"""Texts as the autoregressive model takes them: embeddings, made beforehand by an encoder of one's choice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor

from wavedp.errors import BadFileError, InvalidTypeError, InvalidValueError, MissingFileError
from wavedp.extras import import_extra
from wavedp.models.sizes import described
from wavedp.storage import write_bytes
from wavedp.weights_file import read_tensors


class TextEmbeddings:
    """``embeddings`` [N, L, D], floating point, and ``mask`` [N, L], True where there is text."""

    def __init__(self, embeddings: Tensor, mask: Tensor | None = None) -> None:
        if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
            raise InvalidTypeError(f"embeddings must be a floating-point tensor [N, L, D], got {described(embeddings)}")
        if embeddings.dim() != 3 or 0 in embeddings.shape[1:]:
            raise InvalidValueError(f"embeddings must have shape [N, L, D], got {list(embeddings.shape)}")
        if not bool(embeddings.isfinite().all()):
            raise InvalidValueError("embeddings have values that are not finite")
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool) if mask is None else mask
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != embeddings.shape[:2]:
            raise InvalidValueError(
                f"mask must be a tensor of torch.bool of shape {list(embeddings.shape[:2])}, got {described(mask)}"
            )
        self.embeddings, self.mask = embeddings, mask

    def __len__(self) -> int:
        return len(self.embeddings)

    def rows(self, indices: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Embeddings and mask of some texts."""
        return self.embeddings[indices].to(device), self.mask[indices].to(device)

    def save(self, path: Path | str) -> None:
        """Writes a safetensors file."""
        write_bytes(Path(path), safetensors.torch.save({"embeddings": self.embeddings, "mask": self.mask}))

    @classmethod
    def load(cls, path: Path | str) -> "TextEmbeddings":
        """Reads what `save` wrote. Raises FileNotFoundError, or ValueError naming the file."""
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(f"there is no {path}; make it with TextEmbeddings.save")
        tensors = read_tensors(path.read_bytes(), path)
        if set(tensors) != {"embeddings", "mask"}:
            raise BadFileError(f"{path} holds {sorted(tensors)[:4]}, not embeddings and mask")
        try:
            return cls(tensors["embeddings"], tensors["mask"])
        except (ValueError, TypeError) as error:
            raise BadFileError(f"{path}: {error}") from error


class TextEncoder(Protocol):
    """Turns texts into embeddings. Each text's must depend on that text alone."""

    def __call__(self, texts: Sequence[str]) -> TextEmbeddings: ...


class T5TextEncoder:
    """The encoder of a T5 or FLAN-T5 model of transformers: the last hidden states, ``length`` text tokens each.

    ``path``: a folder that holds model and tokenizer, or a hub id such as google/flan-t5-small; safetensors only.
    """

    def __init__(self, path: str, *, length: int = 32, device: torch.device | str = "cpu") -> None:
        if type(length) is not int or length < 1:
            raise InvalidValueError(f"length must be a positive integer, got {length!r}")
        transformers: Any = import_extra("transformers", "sr")
        local = Path(path).expanduser()
        if not local.is_dir() and (path.startswith(("/", ".", "~")) or path.count("/") > 1):
            raise MissingFileError(f"the folder {path!r} of a T5 model does not exist")
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            self.model = transformers.T5EncoderModel.from_pretrained(path, use_safetensors=True).to(device).eval()
        except (OSError, ValueError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise MissingFileError(
                f"cannot load a T5 encoder from {path!r} ({reason}); it takes a folder with model and tokenizer, the "
                f"weights as safetensors: hf download {path} --local-dir FOLDER"
            ) from error
        self.length, self.device = length, torch.device(device)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], *, batch_size: int = 64) -> TextEmbeddings:
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise InvalidTypeError("texts must be a list of at least one text")
        found, masks = [], []
        for start in range(0, len(texts), batch_size):
            # Every text is padded to the same length, so that none depends on the others of its batch.
            batch = self.tokenizer(
                list(texts[start : start + batch_size]),
                padding="max_length",
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            ).to(self.device)
            states = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            mask = batch["attention_mask"].bool()
            found.append((states.float() * mask[..., None]).cpu())
            masks.append(mask.cpu())
        return TextEmbeddings(torch.cat(found), torch.cat(masks))
