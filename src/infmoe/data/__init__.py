"""Text in, token shards out, and training windows back.

`prepare` turns a `Source` of documents into a folder of uint16 shards with a manifest and a tokenizer;
`TokenData` reads such a folder in O(1) per window; `DataOrder` says which window is read when.
Nothing here imports torch, transformers, tokenizers, datasets or pyarrow until it is needed.
"""

from infmoe.data.order import DataOrder
from infmoe.data.pipeline import Progress, prepare
from infmoe.data.reader import TokenData
from infmoe.data.sources import FileSource, HubSource, MemorySource, Source, StdlibSource, parse_source
from infmoe.data.tokenizer import (
    EOT,
    GPT2Files,
    TokenizerFile,
    TokenizerSpec,
    TrainBPE,
    load_tokenizer,
    parse_tokenizer,
)

__all__ = [
    "EOT",
    "DataOrder",
    "FileSource",
    "GPT2Files",
    "HubSource",
    "MemorySource",
    "Progress",
    "Source",
    "StdlibSource",
    "TokenData",
    "TokenizerFile",
    "TokenizerSpec",
    "TrainBPE",
    "load_tokenizer",
    "parse_source",
    "parse_tokenizer",
    "prepare",
]
