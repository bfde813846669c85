"""Blocks and operations in other people's models and formats.

`seqzoo.hf` names what there is for transformers; `seqzoo.replace`, `timm_attention`, `save_pretrained`,
`from_pretrained` and `push_to_hub` lie here. Nothing else of seqzoo imports this package, which imports other people's
when they are asked for.
"""
