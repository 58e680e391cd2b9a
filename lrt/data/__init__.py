"""Text to tokens to batches: the names that users import. Within the package each is imported from its own module."""

from lrt.data.loader import Batch, BatchShape, Loader, RowSource, prefetch
from lrt.data.manifest import Manifest, Shard
from lrt.data.mixture import Mixture
from lrt.data.prepare import Prepared, prepare, reopen
from lrt.data.shards import TokenStream, open_split, split_documents, write_shards
from lrt.data.sources import documents, source_bytes, source_fingerprint
from lrt.data.synthetic import TaskLoader, TaskRows, batches
from lrt.data.tokenizer import BPETokenizer, ByteTokenizer, PausingTokenizer, Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "BPETokenizer",
    "Batch",
    "BatchShape",
    "ByteTokenizer",
    "Loader",
    "Manifest",
    "Mixture",
    "PausingTokenizer",
    "Prepared",
    "RowSource",
    "Shard",
    "TaskLoader",
    "TaskRows",
    "TokenStream",
    "Tokenizer",
    "batches",
    "documents",
    "load_tokenizer",
    "open_split",
    "prefetch",
    "prepare",
    "reopen",
    "source_bytes",
    "source_fingerprint",
    "split_documents",
    "train_bpe",
    "write_shards",
]
