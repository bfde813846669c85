"""Blocks and operations in other people's models: transformers, timm, PyTorch's own, and the Hugging Face Hub.

`seqzoo.hf` is the module `hf` in here; `seqzoo.replace`, `save_pretrained`, `from_pretrained` and `push_to_hub` are
functions. Nothing of seqzoo imports this package, and other people's are imported when they are asked for.
"""
