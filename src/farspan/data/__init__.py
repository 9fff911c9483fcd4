"""Text in, batches out: corpora, tokenizers, token files, packing and position-exact loading.

Where things are, in the order in which data passes through them:

==================  ====================================================================================================
``corpora``         corpora by name (``python-stdlib``) or path (folder, glob, file, ``.jsonl``): a stream of documents,
                    split into train/valid/test by a hash of the document's name, with a fingerprint of the content
``tokenizers``      the built-in byte-level tokenizer, training of a byte-level BPE, any local Hugging Face tokenizer
``packing``         records (text, prompt and answer, chat rounds) to fixed-length samples with a loss mask
``indexed``         reader and writer of the ``.bin``/``.idx`` token files of GPT-NeoX
``index_maps``      the sample order of GPT-NeoX over such files
``prepare``         corpus + tokenizer -> a prepared dataset directory: parallel, restartable, atomic
``dataset``         the prepared dataset: ``open_dataset(directory)``, documents for evaluation
``permutation``     a seeded permutation of any length whose every entry costs O(1)
``loader``          the training source: packed batches, resumable at any batch, the same for any number of ranks
==================  ====================================================================================================

Importing this package imports neither torch nor transformers; ``loader`` imports torch, and the tokenizers import
transformers when they are used.

Example:
    >>> from farspan.data.prepare import prepare
    >>> from farspan.data.loader import make_loader
    >>> dataset = prepare("python-stdlib", "bpe:4096", "stdlib-bpe4096")            # doctest: +SKIP
    >>> loader = make_loader(dataset, "train", sequence_length=512, batch_size=8)   # doctest: +SKIP
    >>> next(iter(loader))["input_ids"].shape                                       # doctest: +SKIP
    torch.Size([1, 4096])
"""
