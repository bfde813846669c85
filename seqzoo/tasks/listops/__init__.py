"""ListOps expressions: their grammar, and how they are generated."""
