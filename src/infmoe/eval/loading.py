"""Opening what a command is pointed at: a checkpoint, its data, its tokenizer."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from infmoe.checkpoint import resolve_checkpoint, training_data
from infmoe.data import TokenData, load_tokenizer
from infmoe.data.shards import sha256
from infmoe.errors import InfMoEError, unknown_name
from infmoe.hf import InfMoEConfig, InfMoEForCausalLM
from infmoe.layers import ffn_class
from infmoe.layers.routing import DIALS

DTYPES = ("float32", "bfloat16")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Opened:
    """A model that was opened for evaluation.

    Attributes:
        model: in eval mode.
        checkpoint: the folder it came from.
    """

    model: InfMoEForCausalLM
    checkpoint: Path

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The checkpoint's tokenizer.

        Raises:
            InfMoEError: there is none, it is damaged, or it does not fit the model's vocabulary.
        """
        if not (self.checkpoint / "tokenizer.json").is_file():
            raise InfMoEError(f"{self.checkpoint} holds no tokenizer.json: copy the one it was trained with there")
        from transformers import PreTrainedTokenizerFast

        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(self.checkpoint)
        except Exception as error:  # the tokenizers library raises plain Exceptions
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InfMoEError(f"{self.checkpoint / 'tokenizer.json'} is damaged ({reason}): restore it") from error
        check_vocabulary(len(tokenizer), self.model.config.vocab_size, "tokenizer")
        return tokenizer

    def data(self, folder: Path | None = None) -> TokenData:
        """Prepared data that fits the model: `folder`, else what the run was trained on.

        Raises:
            InfMoEError: no such folder is known, or its vocabulary is not the model's.
        """
        folder = folder or training_data(self.checkpoint)
        data = TokenData.open(folder)
        check_vocabulary(data.vocab_size, self.model.config.vocab_size, f"data in {folder}")
        own = self.checkpoint / "tokenizer.json"
        # a tokenizer may be written in more than one way: what counts is which id is which token
        if (
            own.is_file()
            and sha256(own) != data.manifest.tokenizer.sha256
            and self.tokenizer().get_vocab() != load_tokenizer(folder).get_vocab()
        ):
            raise InfMoEError(
                f"the data in {folder} was made with another tokenizer than the model's: "
                f"prepare it with --tokenizer {self.checkpoint}"
            )
        return data


def check_vocabulary(size: int, model_size: int, what: str) -> None:
    """Raise if `what` knows tokens that the model does not."""
    if size > model_size:
        raise InfMoEError(
            f"the {what} has {size} tokens, the model {model_size}: use the tokenizer that the model was trained with"
        )


def open_model(
    path: Path | str, device: str | None = None, dtype: str | None = None, overrides: Sequence[str] = ()
) -> Opened:
    """Open a run folder (its newest valid checkpoint), a checkpoint, or a saved model.

    Args:
        path: the folder.
        device: "cpu", "cuda", ...; None: CUDA if there is any.
        dtype: of `DTYPES`; None: the checkpoint's.
        overrides: "name=value" of the variant's options, in place of the checkpoint's; dials are arguments of a call.

    Raises:
        InfMoEError: nothing there, a damaged file, another architecture, no such type, no such device, or an option
            that the variant does not have.
    """
    if dtype is not None and dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    checkpoint = resolve_checkpoint(path, warn=lambda line: print(line, file=sys.stderr))
    disable_progress_bar()  # a bar over a handful of tensors is noise
    ffn = json.loads((checkpoint / "config.json").read_text()).get("ffn", InfMoEConfig.ffn)
    options = option_overrides(ffn, overrides) if overrides else {}
    try:
        loaded: Any = InfMoEForCausalLM.from_pretrained(
            checkpoint, use_safetensors=True, output_loading_info=True, **options
        )
    except InfMoEError as error:
        raise InfMoEError(f"cannot load a model from {checkpoint}: {error}") from error
    except (OSError, RuntimeError, ValueError, SafetensorError, StrictDataclassError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1].strip()
        raise InfMoEError(f"cannot load a model from {checkpoint}: {reason}") from error
    model, info = loaded
    strange = sorted(info["missing_keys"] | info["unexpected_keys"])
    if strange:  # transformers would draw the missing ones at random
        raise InfMoEError(
            f"the weights in {checkpoint} do not fit its config.json ({len(strange)} missing or unknown, "
            f"e.g. {strange[0]}): restore the folder"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] == "meta":
        raise InfMoEError("device 'meta' holds shapes without numbers: use --device cpu")
    try:
        model = model.eval().to(device, None if dtype is None else getattr(torch, dtype))
    except torch.OutOfMemoryError as error:
        raise InfMoEError(
            f"the model does not fit into {device!r}: use another --device, or --dtype bfloat16"
        ) from error
    except (RuntimeError, AssertionError) as error:  # torch has many words for a device that is not there
        reason = str(error).strip().splitlines()[0]
        raise InfMoEError(f"no device {device!r} to run on here ({reason}): use --device cpu") from error
    return Opened(model, checkpoint)


def option_overrides(ffn: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Options of a variant from "name=value", as `from_pretrained` takes them; null: the default.

    Raises:
        InfMoEError: no `=`, a dial, or no option of the variant; names those that it has.
    """
    defaults = ffn_class(ffn).option_defaults()
    values: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = (part.strip() for part in override.partition("="))
        if not equals:
            raise InfMoEError(f"cannot read {override!r}: write it as name=value, e.g. rank_damping=0.25")
        if name in DIALS and name in defaults:
            raise InfMoEError(f"{name} is a dial: give --{name.replace('_', '-')}")
        if name not in defaults:
            raise unknown_name(f"option of ffn={ffn!r}", name, defaults.keys() - set(DIALS))
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        values[name] = defaults[name] if value is None else value
    return values
